"""What programs say of a model and to the platform that runs them."""

import types

import jax
from clu import platform

from aim_jax.cli import common
from aim_jax.cli.describe import describe
from aim_jax.utils.parameters import parameter_table
from aim_jax.weights.pretrained import Pretrained
from tests.programs import run


def test_a_bundled_model_is_described():
    described = run("describe", "--checkpoint", "cifar10")
    assert described.returncode == 0
    lines = [" ".join(line.split()) for line in described.stdout.splitlines()]
    assert lines[0] == "cifar10" and "10 classes" in lines
    assert "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck" in lines
    for setting in ("cfg_scale 3.0", "mixer mamba2", "n_embed 1024", "aim_steps 4000"):
        assert setting in lines
    # Stored in float16.
    assert (
        "| total | 1,936,236 | 3,872,472 |" in lines and "| total | 859,115 | 1,718,230 |" in lines
    )


def test_a_tokenizer_alone_has_nothing_to_sample(tiny_model):
    names = tuple(f"class {i}" for i in range(25))
    alone = Pretrained(
        "alone", vq_config=tiny_model.vq_config, vq_params=tiny_model.vq_params, class_names=names
    )
    text = "\n".join(describe(alone))
    assert "Sampling" not in text and "AiM" not in text and "Tokenizer" in text
    assert "class 19 and 5 more" in text and "class 20" not in text


def test_parameters_are_counted_by_module():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")  # noqa: E731
    table = parameter_table({"inner": {"a": {"b": shape(3, 4)}, "c": shape(500, 2)}, "d": shape()})
    assert table == (
        "+--------+------------+-------+\n"
        "| Module | Parameters | Bytes |\n"
        "+--------+------------+-------+\n"
        "| inner  | 1,012      | 4,048 |\n"
        "| d      | 1          | 4     |\n"
        "+--------+------------+-------+\n"
        "| total  | 1,013      | 4,052 |\n"
        "+--------+------------+-------+"
    )


def test_the_platform_is_told_which_process_writes_where(monkeypatch):
    told = []

    class Unit(platform.LocalWorkUnit):
        def set_task_status(self, msg):
            told.append(msg)

        def create_artifact(self, artifact_type, artifact, description):
            told.append((artifact_type, artifact, description))

    monkeypatch.setattr(platform, "work_unit", Unit)
    monkeypatch.setattr(common.processes, "initialize_from", lambda given: None)
    config = types.SimpleNamespace(stage="aim", steps=3)
    given = types.SimpleNamespace(config=config, data="", workdir="runs/mine")
    monkeypatch.setattr(common.flags, "FLAGS", given)
    monkeypatch.setattr(common, "config_name", lambda: "mine")
    finished = types.SimpleNamespace(step=3)
    assert common.start_training(lambda config, workdir: finished, "aim") == 0
    directory = platform.ArtifactType.DIRECTORY
    assert told == [
        "process_index: 0, process_count: 1",
        (directory, "runs/mine", "workdir"),
    ]
