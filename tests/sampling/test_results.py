import json

import pytest

from sampling.results import write_result

SCORE = {"value": 3.0, "samples": 50, "precision": "fp32", "metric": "FID", "seconds": 9.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 10}, "samples was 50, now 10"),
        ({"precision": "bf16"}, "precision was fp32, now bf16"),
        ({"metric": "KID"}, "metric was FID, now KID"),
    ],
)
def test_a_score_with_other_settings_is_kept(changes, said, tmp_path, capsys):
    path = tmp_path / "samples" / "model.json"
    write_result("", path, SCORE)
    write_result("", path, SCORE | changes)
    assert json.loads(path.read_text()) == SCORE | changes
    kept = path.with_name("model.json.old-1")
    assert json.loads(kept.read_text()) == SCORE
    assert capsys.readouterr().err == f"note: {path} held a score with other settings ({said}): it is now {kept}\n"


def test_a_picture_without_a_score_does_not_replace_one(tmp_path):
    path = tmp_path / "model.json"
    write_result("", path, SCORE)
    write_result("", path, {"samples": 50, "precision": "fp32", "seconds": 1.0})
    assert json.loads((tmp_path / "model.json.old-1").read_text()) == SCORE


@pytest.mark.parametrize("before", [SCORE, {"samples": 3}, None])
def test_other_files_are_replaced(before, tmp_path):
    path = tmp_path / "model.json"
    path.write_text("damaged" if before is None else json.dumps(before))
    after = SCORE | {"value": 4.0, "seconds": 1.0}
    write_result("", path, after)
    assert json.loads(path.read_text()) == after
    assert [file.name for file in tmp_path.iterdir()] == ["model.json"]


def test_a_chosen_file_is_replaced(tmp_path):
    chosen = tmp_path / "result.json"
    for samples in (50, 10):
        write_result(str(chosen), tmp_path / "other.json", SCORE | {"samples": samples})
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
