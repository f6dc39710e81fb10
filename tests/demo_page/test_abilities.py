import dataclasses

import pytest

from datasets_prep.label_maps.celebamask_hq import CELEBA_CLASSES
from demo_page.abilities import MISSING, TABS, Abilities
from flow.flow_maps.mean_flow import MeanFlowOptions
from models.conditions import DenseInput
from tests.demo_models import FACTS, demo_header


def test_classes_have_names_and_the_null_class_is_last():
    named = [("shirt", 0), ("shoe", 1), ("bag", 2)]
    assert Abilities(demo_header()).classes == [*named, ("any class", 3)]
    without = Abilities(demo_header(label_dropout=0.0))
    assert without.classes == named
    assert not without.guidance
    assert without.guidance_scale == 1
    unnamed = dataclasses.replace(demo_header(), dataset=dataclasses.replace(FACTS, class_names=()))
    assert Abilities(unnamed).classes[1] == ("class 1", 1)


def test_average_velocities_are_offered_to_networks_that_predict_them():
    plain = Abilities(demo_header())
    assert "flow_map" not in plain.methods
    assert plain.method == "dpm"
    header = demo_header(until_embedding="interval")
    assert Abilities(header).method == "dpm"  # its objective did not train them
    few = Abilities(dataclasses.replace(header, objective="mean_flow", path=MeanFlowOptions()))
    assert (few.method, few.steps, few.guidance_scale, few.few_steps) == ("flow_map", 2, 1.0, True)
    assert {"flow_map", "dopri5"} < set(few.methods)
    assert "torchdiffeq_dopri5" not in few.methods


@pytest.mark.parametrize("task", MISSING)
def test_every_task_fills_a_tab_and_a_sentence_says_why_others_are_empty(task):
    missing = Abilities(demo_header(task)).missing
    assert set(missing) < set(TABS)
    assert all(reason.endswith(".") for reason in missing.values())


def test_classes_of_label_maps():
    assert Abilities(demo_header()).map_classes is None
    own = Abilities(demo_header("semantic")).map_classes
    assert own is not None
    assert own.names == ("background", *FACTS.class_names)
    header = demo_header("semantic")
    faces = dataclasses.replace(
        header, dataset=dataclasses.replace(FACTS, name="celeba_256"), dense=DenseInput(12, classes=19)
    )
    assert Abilities(faces).map_classes is CELEBA_CLASSES
    scenes = dataclasses.replace(
        header, dataset=dataclasses.replace(FACTS, name="coco"), dense=DenseInput(12, classes=182)
    )
    found = Abilities(scenes).map_classes
    assert found is not None
    assert (found.count, found.background, found.names[3]) == (182, False, "class 3")


def test_the_description_names_network_task_and_data():
    text = Abilities(dataclasses.replace(demo_header(), step=1200)).describe()
    assert text == "DiT-Mi/2 for generation on tiny, 14 x 14 pixels (flow_matching, 1,200 steps)"


def test_samples_at_first():
    assert Abilities(demo_header()).samples(16) == 3
    assert Abilities(demo_header()).samples(2) == 2
    large = dataclasses.replace(demo_header(), dataset=dataclasses.replace(FACTS, image_size=256, crop=None))
    assert Abilities(large).samples(16) == 4
