"""Reports on model cards: only of the parameters that are published."""

import dataclasses
import json

import jax
import pytest

from aim_jax.evaluation.report import read_report
from aim_jax.weights.directories import save_model
from aim_jax.weights.fingerprints import parameter_fingerprints
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.publish import check_report, model_card, publish
from tests.programs import run


def report_of(model, **changes):
    """A report as `evaluate` writes it, of a model's parameters."""
    content = {
        "title": "Evaluation of tiny", "metrics": {"fid": 12.5}, "notes": [],
        "settings": {"model": "tiny"}, "environment": {"commit": "abc"},
        "parameters": parameter_fingerprints(model),
    }  # fmt: skip
    return content | changes


def changed(model, part):
    params = jax.tree.map(lambda x: x + 1e-3, getattr(model, part))
    return dataclasses.replace(model, **{part: params})


def test_report_of_the_published_parameters_is_on_the_card(tiny_model, tiny_model_dir, tmp_path):
    card = publish(tiny_model_dir, tmp_path / "out", report_of(tiny_model)) / "README.md"
    assert "| fid | 12.5 |" in card.read_text()
    # A tokenizer's own report, of a model whose AiM plays no part.
    tokenizer = report_of(tiny_model)["parameters"]["tokenizer"]
    of_tokenizer = report_of(tiny_model, parameters={"tokenizer": tokenizer})
    check_report(of_tokenizer, tiny_model)


@pytest.mark.parametrize("part", ["aim_params", "vq_params"])
def test_report_of_other_parameters_is_refused(part, tiny_model):
    other = report_of(changed(tiny_model, part))
    name = {"aim_params": "AiM", "vq_params": "tokenizer"}[part]
    with pytest.raises(ValueError, match=f"other parameters than tiny: the {name} of tiny made"):
        check_report(other, tiny_model)
    alone = dataclasses.replace(tiny_model, **{part: None})
    with pytest.raises(ValueError, match="of other parameters than tiny"):
        check_report(report_of(tiny_model), alone)


def test_report_of_another_decoder_is_refused(tiny_model, tiny_model_dir, tmp_path):
    """A report from before the tokenizer was replaced is not of the published images."""
    params = dict(tiny_model.vq_params)
    params["decoder"] = jax.tree.map(lambda x: x * 1.01, params["decoder"])
    better = dataclasses.replace(tiny_model, vq_params=params)
    path = save_model(tmp_path / "better", better)
    with pytest.raises(ValueError, match="the tokenizer of tiny made its images"):
        publish(tiny_model_dir, tmp_path / "out", report_of(tiny_model), tokenizer=path)
    assert not (tmp_path / "out").exists()
    check_report(report_of(better), better)


def test_report_of_unknown_parameters_is_refused(tiny_model):
    older = report_of(tiny_model)
    del older["parameters"]
    for report, message in (
        (older, "does not record which parameters it is of, because an older version"),
        (report_of(tiny_model, parameters={}), r"of images from files \(--samples\)"),
        (report_of(tiny_model, parameters=[]), "does not record which parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            check_report(report, tiny_model)


def test_fingerprints_do_not_depend_on_how_a_model_is_loaded(tiny_model, tmp_path):
    path = save_model(tmp_path / "half", tiny_model, "float16")
    found = [parameter_fingerprints(load_pretrained(path, as_stored=x)) for x in (False, True)]
    assert found[0] == found[1] != parameter_fingerprints(tiny_model)
    assert list(found[0]) == ["AiM", "tokenizer"]


def test_directories_without_a_report_are_refused(tiny_model, tiny_model_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no report\.json; expected .* --out"):
        read_report(tmp_path)
    for text, message in (("{", "is not a report"), ('{"metrics": {}}', "notes, settings, env")):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report_of(changed(tiny_model, "vq_params"))))
    given = ("--checkpoint", tiny_model_dir, "--evaluation", tmp_path, "--out", tmp_path / "out")
    done = run("publish", *given)
    assert done.returncode == 1 and "of other parameters than" in done.stderr
    assert not (tmp_path / "out").exists()


def test_only_metrics_have_deviations(tiny_model):
    report = {
        "metrics": {"kid": [0.5, 0.25]}, "settings": {"cfg_interval": [0.1, 0.9]},
        "environment": {}, "notes": [],
    }  # fmt: skip
    info = {"pair": [None, 1], "words": ["a", "b"]}
    text = model_card(dataclasses.replace(tiny_model, info=info), report)
    for line in ("| kid | 0.5 ± 0.25 |", "cfg_interval [0.1, 0.9]", "| pair | [null, 1] |"):
        assert line in text
