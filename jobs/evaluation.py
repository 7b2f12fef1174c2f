"""Runs a protocol on a model and writes report, data and figures, for `jobs.evaluate` and `jobs.demo`."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.contract import JobRun, Outcome
from jobs.provenance import versions
from mfm_ray.config import flatten, to_dict
from mfm_ray.errors import InputError
from mfm_ray.protocols import Protocol
from mfm_ray.protocols.gmm import GmmProtocol
from mfm_ray.protocols.imagenet_finetuning import ImagenetFinetuningProtocol
from mfm_ray.storage import Storage

REPORT, DATA = "report.html", "data.parquet"


@dataclass(frozen=True)
class Evaluator:
    """How a protocol is run.

    load: (protocol, model, data or None for bundled data, seed) to its material, InputError naming what is missing or
    damaged; evaluate: (protocol, material, seed=, log=) to an evaluation that has `metrics()`, with pieces= besides
    where it is made in pieces; data: (evaluation, history) to the bytes of a Parquet file; report: (evaluation,
    provenance) to a page; table: lines for the terminal; files: (run, evaluation) to further artifacts, written.
    """

    load: Callable[[Any, Storage, Storage | None, int], Any]
    evaluate: Callable[..., Any]
    data: Callable[[Any, Sequence[Mapping[str, float]]], bytes]
    report: Callable[[Any, Any], str]
    table: Callable[[Any], list[str]]
    in_pieces: bool = False
    files: Callable[[JobRun, Any], dict[str, str]] = field(default=lambda run, evaluation: {})


def evaluator(name: str) -> Evaluator:
    """Of the protocol of that name."""
    return _EVALUATORS[name]()


def needs_model(protocol: Protocol) -> bool:
    """Whether a protocol is about a model: the mixture's own flow map is steered without one, and runs are read."""
    if isinstance(protocol, ImagenetFinetuningProtocol):
        return False
    return not isinstance(protocol, GmmProtocol) or protocol.needs_model


def recipe_of(protocol: Protocol) -> str:
    """The recipe that is trained where no model is given. InputError for a protocol that measures a given one."""
    recipe = getattr(protocol, "experiment", None)
    if recipe is None:
        raise InputError(f"model=null: protocol={protocol.name} measures a model; expected a model directory")
    return str(recipe)


def evaluate_model(
    run: JobRun,
    protocol: Protocol,
    model: Storage | None,
    data: Storage | None,
    *,
    command: str,
    history: Sequence[Mapping[str, float]] = (),
    train_seconds: float | None = None,
    facts: Mapping[str, str] | None = None,
    began: float,
) -> Outcome:
    """The outcome of an evaluation. model: None for a protocol that needs none; data: shards, None for bundled data;
    began: time.monotonic() of the job's start.
    """
    from mfm_ray.reporting.provenance import Provenance

    how = evaluator(protocol.name)
    material = None if model is None else how.load(protocol, model, data, run.seed)
    pieces = {"pieces": _stored_pieces(run, protocol, model, data, material)} if how.in_pieces else {}
    evaluation = how.evaluate(protocol, material, seed=run.seed, log=run.log, **pieces)
    total = time.monotonic() - began
    provenance = Provenance(
        command=command,
        versions=versions(),
        settings={key: value for key, value in flatten(to_dict(run.config)).items() if not isinstance(value, dict)},
        facts=dict(facts or {}),
        history=history,
        train_seconds=train_seconds,
        total_seconds=total,
    )
    run.storage.write_bytes(DATA, how.data(evaluation, history))
    run.storage.write_bytes(REPORT, how.report(evaluation, provenance).encode())
    run.log("\n".join(["", *how.table(evaluation)]))
    run.log(f"report: {run.storage.uri_of(REPORT)}")
    used = {**({} if model is None else {"model": model.uri}), **how.files(run, evaluation)}
    timing = {} if train_seconds is None else {"train_seconds": train_seconds}
    return Outcome(
        metrics={**timing, "total_seconds": time.monotonic() - began, **evaluation.metrics()},
        artifacts={"report": run.storage.uri_of(REPORT), "data": run.storage.uri_of(DATA), **used},
    )


def _stored_pieces(run: JobRun, protocol: Any, model: Storage | None, data: Storage | None, material: Any) -> Any:
    from jobs.evaluation_pieces import StoredPieces
    from jobs.large_evaluation import deciding_settings

    assert model is not None, "what is made in pieces is about a model"
    return StoredPieces(run=run, settings=deciding_settings(protocol, model, data, material, run.seed))


def _digits() -> Evaluator:
    from mfm_ray.protocols.digits import Material, evaluate_digits
    from mfm_ray.protocols.table import evaluation_parquet
    from mfm_ray.reporting.digits import digits_report, headline
    from mfm_ray.reporting.terminal import evaluation_table

    return Evaluator(
        load=lambda protocol, model, data, seed: Material(*_digit_parts(model, data)),
        evaluate=evaluate_digits,
        data=evaluation_parquet,
        report=digits_report,
        table=lambda evaluation: [*evaluation_table(evaluation), "", headline(evaluation)],
    )


def _gmm() -> Evaluator:
    from mfm_ray.pretrained import load_flow_map
    from mfm_ray.protocols.gmm import evaluate_gmm, gmm_parquet
    from mfm_ray.reporting.gmm import gmm_report, gmm_table

    return Evaluator(
        load=lambda protocol, model, data, seed: load_flow_map(model),
        evaluate=evaluate_gmm,
        data=lambda evaluation, history: gmm_parquet(evaluation),
        report=gmm_report,
        table=gmm_table,
    )


def _finetune_gmm() -> Evaluator:
    from mfm_ray.pretrained import load_flow_map
    from mfm_ray.protocols.finetune_gmm import evaluate_finetune_gmm, finetune_gmm_parquet
    from mfm_ray.reporting.finetuning import finetune_gmm_report, finetune_gmm_table

    return Evaluator(
        load=lambda protocol, model, data, seed: load_flow_map(model),
        evaluate=evaluate_finetune_gmm,
        data=lambda evaluation, history: finetune_gmm_parquet(evaluation),
        report=finetune_gmm_report,
        table=finetune_gmm_table,
    )


def _finetune_digits() -> Evaluator:
    from mfm_ray.protocols.digits import Material
    from mfm_ray.protocols.finetune_digits import evaluate_finetune_digits, finetune_digits_parquet
    from mfm_ray.reporting.finetuning import finetune_digits_report, finetune_digits_table

    return Evaluator(
        load=lambda protocol, model, data, seed: Material(*_digit_parts(model, data)),
        evaluate=evaluate_finetune_digits,
        data=lambda evaluation, history: finetune_digits_parquet(evaluation),
        report=finetune_digits_report,
        table=finetune_digits_table,
    )


def _values() -> Evaluator:
    from mfm_ray.protocols.values import evaluate_values, values_parquet
    from mfm_ray.reporting.values import values_report, values_table

    return Evaluator(
        load=lambda protocol, model, data, seed: _values_material(model, data),
        evaluate=evaluate_values,
        data=lambda evaluation, history: values_parquet(evaluation),
        report=values_report,
        table=values_table,
    )


def _imagenet_fid() -> Evaluator:
    from jobs.large_evaluation import adm_batches, load_fid
    from mfm_ray.protocols.imagenet_fid import evaluate_imagenet_fid, imagenet_fid_parquet
    from mfm_ray.reporting.imagenet import fid_report, fid_table

    return Evaluator(
        load=load_fid,
        evaluate=evaluate_imagenet_fid,
        data=lambda evaluation, history: imagenet_fid_parquet(evaluation),
        report=fid_report,
        table=fid_table,
        in_pieces=True,
        files=adm_batches,
    )


def _imagenet_posterior() -> Evaluator:
    from jobs.large_evaluation import load_posterior
    from mfm_ray.protocols.imagenet_posterior import evaluate_imagenet_posterior, imagenet_posterior_parquet
    from mfm_ray.reporting.imagenet import posterior_report, posterior_table

    return Evaluator(
        load=load_posterior,
        evaluate=evaluate_imagenet_posterior,
        data=lambda evaluation, history: imagenet_posterior_parquet(evaluation),
        report=posterior_report,
        table=posterior_table,
        in_pieces=True,
    )


def _imagenet_values() -> Evaluator:
    from jobs.large_evaluation import load_values
    from mfm_ray.protocols.imagenet_values import evaluate_imagenet_values
    from mfm_ray.protocols.values import values_parquet
    from mfm_ray.reporting.values import values_report, values_table

    return Evaluator(
        load=load_values,
        evaluate=evaluate_imagenet_values,
        data=lambda evaluation, history: values_parquet(evaluation),
        report=values_report,
        table=values_table,
        in_pieces=True,
    )


def _imagenet_steering() -> Evaluator:
    from jobs.large_evaluation import load_steering
    from mfm_ray.protocols.imagenet_steering import evaluate_imagenet_steering, imagenet_steering_parquet
    from mfm_ray.reporting.imagenet import steering_report, steering_table

    return Evaluator(
        load=load_steering,
        evaluate=evaluate_imagenet_steering,
        data=lambda evaluation, history: imagenet_steering_parquet(evaluation),
        report=steering_report,
        table=steering_table,
        in_pieces=True,
    )


def _imagenet_finetuning() -> Evaluator:
    from mfm_ray.protocols.imagenet_finetuning import evaluate_imagenet_finetuning, imagenet_finetuning_parquet
    from mfm_ray.reporting.imagenet import tuning_report, tuning_table

    return Evaluator(
        load=lambda protocol, model, data, seed: None,
        evaluate=evaluate_imagenet_finetuning,
        data=lambda evaluation, history: imagenet_finetuning_parquet(evaluation),
        report=tuning_report,
        table=tuning_table,
    )


_EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    "digits": _digits,
    "finetune_digits": _finetune_digits,
    "finetune_gmm": _finetune_gmm,
    "gmm": _gmm,
    "imagenet_fid": _imagenet_fid,
    "imagenet_finetuning": _imagenet_finetuning,
    "imagenet_posterior": _imagenet_posterior,
    "imagenet_steering": _imagenet_steering,
    "imagenet_values": _imagenet_values,
    "mnist": _digits,
    "values": _values,
}


def _values_material(model: Storage, data: Storage | None) -> Any:
    """Flow map and held-out data, with the classifier of a model of images."""
    from jobs.prepare_data import make_dataset
    from mfm_ray.data.shards import load_split
    from mfm_ray.pretrained import load_flow_map, read_model_config
    from mfm_ray.protocols.values import ValuesMaterial

    described = read_model_config(model)["data"]
    if described["kind"] == "image":
        flow_map, classifier, _, heldout = _digit_parts(model, data)
        return ValuesMaterial(flow_map, heldout, classifier)
    heldout = make_dataset(described["name"]).splits["heldout"] if data is None else load_split(data, "heldout")
    return ValuesMaterial(load_flow_map(model), heldout)


def _digit_parts(model: Storage, data: Storage | None) -> tuple[Any, Any, Any, Any]:
    """Flow map, judge, training and held-out images."""
    from jobs.prepare_data import BUNDLED, make_dataset
    from mfm_ray.data.shards import load_split
    from mfm_ray.pretrained import load_classifier, load_flow_map, read_model_config

    flow_map, classifier = load_flow_map(model), load_classifier(model)
    if data is not None:
        return flow_map, classifier, load_split(data, "train"), load_split(data, "heldout")
    name = read_model_config(model)["data"]["name"]
    if name not in BUNDLED:
        raise InputError(f"data_path=null: expected the prepared data of {name} (python -m jobs.prepare_data)")
    splits = make_dataset(name).splits
    return flow_map, classifier, splits["train"], splits["heldout"]


def command_line(job: str) -> str:
    """What was typed, to be typed again."""
    return shlex.join(["python", "-m", f"jobs.{job}", *sys.argv[1:]])
