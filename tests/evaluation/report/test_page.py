import json
import re
import shutil

import pytest

from evaluation.report.page import ReportOptions, write_report
from options import UsageError
from training.checkpointing import REPORT


def written(folders, path, **options):
    write_report(folders, ReportOptions(output=str(path), **options))
    return path


def test_the_page_has_every_metric_and_refers_to_nothing_outside_it(run_folder, tmp_path, read_page):
    path = written([run_folder], tmp_path / "page.html")
    page, entries = read_page(path), (run_folder / "metrics.jsonl").read_text().splitlines()
    for entry in map(json.loads, entries):
        for name in entry.keys() - {"step", "kind"}:
            assert re.search(rf"\b{entry['kind']}/{name}\b", page.text), name
    without_pictures = re.sub(r'src="data:[^"]*"', "", path.read_text())
    assert not re.search(r"https?:|//\w|@import|url\(", without_pictures)
    assert {tag for tag, _ in page.elements} & {"link", "iframe", "object", "base"} == set()
    assert all(source.startswith("data:image/png;base64,") for source in page.attributes("img", "src"))
    assert all(target.startswith("#") for target in page.attributes("a", "href"))
    assert "default-src 'none'" in page.attributes("meta", "content")[1]


def test_links_and_labels_lead_to_elements_and_pictures_have_texts(run_folder, tmp_path, read_page):
    page = read_page(written([run_folder], tmp_path / "page.html"))
    names = page.attributes("section", "aria-labelledby")
    identities = [values["id"] for _, values in page.elements if "id" in values]
    assert len(set(identities)) == len(identities)
    assert [target[1:] for target in page.attributes("a", "href")] == names
    assert set(names) <= set(identities)
    assert all(page.attributes("img", "alt"))
    assert len(page.attributes("img", "alt")) == len(page.attributes("img", "src")) > 0
    charts = [values for tag, values in page.elements if tag == "svg" and values.get("role") == "img"]
    assert len(charts) >= 8
    assert all("over training steps" in chart["aria-label"] for chart in charts)


def test_scores_say_how_they_were_made(run_folder, tmp_path, read_page):
    text = read_page(written([run_folder], tmp_path / "page.html")).text
    assert "0.5 ± 0.062" in text
    assert (
        "model_3.safetensors at step 14 (weights 0123456789ab); heun with 8 steps on a uniform grid, time shift 2; guidance "
        "2.5 for t from 0.2 to 0.7; seed 42; 16 network evaluations per sample; fp32; features pebbles; against 40 images of "
        "stripes train; 1 min 30 s; warning: 1000 samples are few"
    ) in text
    assert "KID (pebble features)" in text


def test_energy_is_time_times_power(run_folder, tmp_path, read_page):
    (run_folder / "metrics.jsonl").write_text('{"step": 14, "kind": "train", "seconds": 270.0}\n')
    text = read_page(written([run_folder], tmp_path / "page.html")).text
    assert "20 W (10 W for each thread of the CPU)" in text
    assert "\n2 Wh\n" in text  # 20 W for 270 s of training and 90 s of sampling
    assert "112 (2.8 epochs of 40)" in text
    assert "16,000" in text  # evaluations of scored samples
    text = read_page(written([run_folder], tmp_path / "page.html", watts=100.0)).text
    assert "100 W (given by --watts)" in text
    assert "\n10 Wh\n" in text


def test_several_runs_are_named_and_their_differences_listed(run_folder, tmp_path, read_page):
    other = tmp_path / "elsewhere" / "pebbles"
    shutil.copytree(run_folder, other)
    config = json.loads((other / "config.json").read_text())
    config["options"]["lr"] = 0.02
    (other / "config.json").write_text(json.dumps(config))
    path = written([run_folder, other], tmp_path / "page.html")
    text = read_page(path).text
    names = [f"{tmp_path.name}/pebbles", "elsewhere/pebbles"]
    assert all(name in text for name in names)
    configuration = path.read_text().partition('id="configuration"')[2].partition("<details>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', configuration) == ["lr"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", configuration) == ["0.01", "0.02"]


def test_names_are_escaped(run_folder, tmp_path, read_page):
    folder = run_folder.rename(tmp_path / "<script>alert(1)<")
    config = {"options": {'"><img src=x>': "<b>"}}
    (folder / "config.json").write_text(json.dumps(config))
    path = written([folder], tmp_path / "page.html")
    assert "<script>alert(1)<" in read_page(path).text
    assert path.read_text().count("<script>") == 1
    assert "src=x" not in {name for tag, values in read_page(path).elements for name in values}


def test_the_same_files_give_the_same_page(run_folder, tmp_path):
    pages = [written([run_folder], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.json", "samples", "*.safetensors"])
def test_missing_files_leave_the_rest(missing, run_folder, tmp_path, read_page):
    for path in run_folder.glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read_page(written([run_folder], tmp_path / "page.html"))
    assert "Report: pebbles" in page.text
    assert ("cannot read" in page.text) == (missing in ("metrics.jsonl", "config.json"))


def test_damaged_files_are_listed(run_folder, tmp_path, read_page):
    damaged = ["metrics.jsonl", "config.json", "best.safetensors", "samples/model_3_heun.json"]
    damaged += ["samples/step_0000014.png", "samples/model_9.json"]
    for name in damaged:
        (run_folder / name).write_bytes(b'{"step": 1, "ki\xff')
    page = read_page(written([run_folder], tmp_path / "page.html"))
    problems = page.text.partition("Not readable\n")[2]
    assert [name for name in damaged if name.rpartition("/")[2] not in problems.rpartition("Not readable")[2]] == []


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected the folder of a run"):
        write_report([tmp_path], ReportOptions())
    with pytest.raises(UsageError, match="does not exist"):
        write_report([tmp_path / "nowhere"], ReportOptions())


def test_a_run_given_twice_is_refused(run_folder):
    with pytest.raises(UsageError, match="given twice"):
        write_report([run_folder, run_folder], ReportOptions())


def test_training_ends_with_a_report(trained_folder, read_page):
    page = read_page(trained_folder / REPORT)
    assert "Report: pebbles" in page.text
    assert "train/loss" in page.text


def test_the_slider_has_the_steps_of_the_grids(run_folder, tmp_path, read_page):
    page = read_page(written([run_folder], tmp_path / "page.html"))
    (steps,) = page.attributes("div", "data-steps")
    assert json.loads(steps) == [10, 14]
    assert page.attributes("figure", "data-step") == ["10", "14"]
    assert page.attributes("input", "max") == ["1"]
    page = read_page(written([run_folder], tmp_path / "page.html", grids=1))
    assert page.attributes("figure", "data-step") == ["14"]
    assert page.attributes("div", "data-steps") == []


def test_large_pictures_are_reduced(run_folder, tmp_path, read_page, monkeypatch):
    monkeypatch.setattr("evaluation.report.pictures.MOST_BYTES", 10)
    monkeypatch.setattr("evaluation.report.pictures.MOST_PIXELS", 50)
    page = read_page(written([run_folder], tmp_path / "page.html"))
    assert all(source.startswith("data:image/webp") for source in page.attributes("img", "src"))
    assert max(int(width) for width in page.attributes("img", "width")) == 50


def test_the_command(run_folder, tmp_path, call):
    output = tmp_path / "new" / "page.html"
    code, out, err = call("evaluation/report/__main__.py", [run_folder, "--output", output])
    assert (code, err) == (0, "")
    assert out.startswith(f"report      {output}, ")
    code, _, err = call("evaluation/report/__main__.py", ["--output", output])
    assert code == 2
    assert "expected RUN [RUN ...]" in err
