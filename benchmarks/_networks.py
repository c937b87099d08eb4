"""Networks made smaller and faster: a pruned, taught, quantized encoder and ranker beside the ones trained.

The teacher is SASRec at d = 128 with four blocks. Smaller ones of its kind are cut out of it by measured
importance and trained on under its answers (`train.start`, `train.teacher`). Each is then run in every form
there is; on the validation split those that lose at most `BOUND` of NDCG@10 are kept, and of them the fastest
is told, with what it loses on the test split.

`eager` is the network as a text book has it: every position of every history, padded to the longest of the
batch, float32, torch. `onnxruntime-int8` is that network exported and quantized as ONNX Runtime does it by
default. Speeds are medians over interleaved turns on real histories of the test users, tables' rows included.

`RECRAY_BENCH` names a folder in which what was trained is kept from one run to the next.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._sets import ml1m, ml100k, there
from benchmarks.rows import Row
from recray.bundles.build import sample_inputs
from recray.bundles.plan import Graph
from recray.bundles.stage import example_inputs, write_graph
from recray.compression.fastest import Form, fastest
from recray.compression.graph import OnnxNetwork, export_onnx, quiet
from recray.compression.prune import dense_parameters
from recray.data.dataset import Cases, Dataset
from recray.data.sequences import Histories
from recray.evaluation import Report, evaluate, model_top_k, ranker_top_k
from recray.manifest import Artefact, open_artefact
from recray.models.base import Model
from recray.models.saved import load_model
from recray.models.sequential import Encoder
from recray.progress import say
from recray.recipes import recipe
from recray.training.run import train

BOUND = 0.005  # of NDCG@10, relative
USERS = (1, 64)
CANDIDATES = 200  # as many as a bundle takes by default
THREADS = 1
FORMS: tuple[Graph, ...] = ("eager", "onnx", "onnx-int8", "onnx-static")
PEERS = ("eager", "onnxruntime-int8")

ENCODER = ("options.dim=128", "options.blocks=4", "options.heads=4", "options.head_dim=32")
ENCODERS: dict[str, tuple[str, ...]] = {  # what is cut out of the teacher
    "half": ("options.blocks=3", "options.ffn_width=256"),
    "quarter": ("options.blocks=2", "options.heads=2", "options.ffn_width=192"),
    "tenth": ("options.blocks=1", "options.heads=2", "options.ffn_width=64"),
}
RECOVERY = ("train.lr=0.0002", "train.teach_weight=0.5")  # a fifth of the teacher's: more undoes what is kept
RANKER = ("options.dim=32", "options.hidden=256,256", "options.rank=64")
RANKERS: dict[str, tuple[str, ...]] = {
    "half": ("options.hidden=128,64", "options.rank=32"),
    "quarter": ("options.hidden=64,32", "options.rank=16"),
}
# cut out of nothing, so it has the epochs of those that are, and their teacher's
POOLED = ("options.history=pool", "options.hidden=64,32", "options.rank=16")


@dataclass(frozen=True)
class Work:
    """A set, and how long the models are trained on it."""

    name: str
    prepare: Callable[[Path], Dataset]
    words: tuple[str, ...]
    ranker_epochs: int = 0  # 0: the recipe's
    encoder: str = "sasrec"
    ranker: str = "dcn"


LONG = ("train.epochs=60", "train.patience=5")
WORKS = {
    "ml100k": Work("ml100k", ml100k, LONG, 3),  # of a ranker: minutes each
    "ml1m": Work("ml1m", ml1m, LONG, ranker="dcn@ml1m"),
}
QUICK = Work("ml100k", ml100k, ("train.epochs=2",), 1)


def network_rows(quick: bool, which: str = "ml100k", only: str = "") -> Iterator[Row]:
    """The encoder's and the ranker's speed, and what the students keep; `only`: "encoder" or "ranker"."""
    work = QUICK if quick else WORKS[which]
    if not there(work.name):
        return
    with contextlib.ExitStack() as stack:
        kept = os.environ.get("RECRAY_BENCH")
        made = kept or stack.enter_context(tempfile.TemporaryDirectory(prefix="recray-bench-"))
        folder = Path(made) / work.name
        folder.mkdir(parents=True, exist_ok=True)
        before = torch.get_num_threads()
        data = work.prepare(folder / "data")
        teacher = trained(data, work.encoder, (*ENCODER, *work.words), folder / "teacher")
        try:
            if only in "encoder":
                yield from encoder_rows(work, data, teacher, folder, quick)
            if only in "ranker":
                yield from ranker_rows(work, data, teacher, folder, quick)
        finally:
            torch.set_num_threads(before)


def encoder_rows(work: Work, data: Dataset, teacher: Artefact, folder: Path, quick: bool) -> Iterator[Row]:
    """What the students keep, then the fastest form of any that loses little enough."""
    models: dict[str, Any] = {"teacher": load_model(teacher)}
    uri = teacher.place.uri
    behind = (f"train.start={uri}", f"train.teacher={uri}", *RECOVERY)
    for name, shape in ENCODERS.items():
        words = (*ENCODER, *work.words, *shape, *behind)
        models[name] = load_model(trained(data, work.encoder, words, folder / f"student-{name}"))
    whole = dense_parameters(models["teacher"])
    test, valid = data.cases("test"), data.cases("valid")
    base = evaluate(model_top_k(models["teacher"]), test, ks=(10,))
    for name in ("quarter", "tenth"):
        report = evaluate(model_top_k(models[name]), test, ks=(10,))
        share = dense_parameters(models[name]) / whole
        yield kept_row(work, f"student, {name}", report, base, {"parameters": round(share, 4)})

    def judged(model: Any, cases: Cases) -> Report:
        return evaluate(model_top_k(model), cases, ks=(10,))

    calls = Calls(lambda model, asked: model.encode(asked), textbook(models["teacher"]), histories_of(test))
    yield from speed_rows(
        "sasrec d=128, 4 blocks", work, data, models, calls, (valid, test, judged), folder, quick
    )


def ranker_rows(work: Work, data: Dataset, retriever: Artefact, folder: Path, quick: bool) -> Iterator[Row]:
    """The fastest form of the ranker, of those cut out of it, and of one that pools in place of attending."""
    epochs = work.ranker_epochs or recipe(work.ranker).train.epochs
    words = (*RANKER, f"train.epochs={epochs}")
    first = trained(data, work.ranker, words, folder / "ranker", retriever)
    models: dict[str, Any] = {"teacher": load_model(first)}
    for name, shape in RANKERS.items():
        smaller = (*words, *shape, f"train.start={first.place.uri}", "train.lr=0.001")
        models[name] = load_model(trained(data, work.ranker, smaller, folder / f"ranker-{name}", retriever))
    if not quick:
        longer = (*words, *POOLED, f"train.epochs={2 * epochs}")
        models["pooled"] = load_model(trained(data, work.ranker, longer, folder / "ranker-pooled", retriever))
    proposed = model_top_k(load_model(retriever))  # type: ignore[arg-type]

    def judged(model: Any, cases: Cases) -> Report:
        return evaluate(ranker_top_k(model, proposed, CANDIDATES), cases, ks=(10,))

    test, valid = data.cases("test"), data.cases("valid")
    draw = np.random.default_rng(0)

    def scored(model: Any, histories: Histories) -> Tensor:
        candidates = draw.integers(0, model.n_items, (len(histories), CANDIDATES))
        return model.score(histories, candidates)  # type: ignore[no-any-return]

    calls = Calls(scored, models["teacher"], histories_of(test))
    yield from speed_rows("widest ranker", work, data, models, calls, (valid, test, judged), folder, quick)


# -- the measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """How a model is asked, the model as a text book has it, and batches of histories by their size."""

    ask: Callable[[Any, Histories], Tensor]
    plain: Any
    batches: Mapping[int, list[Histories]]


Judged = tuple[Cases, Cases, Callable[[Any, Cases], Report]]


def speed_rows(
    name: str,
    work: Work,
    data: Dataset,
    models: Mapping[str, Model],
    calls: Calls,
    judged: Judged,
    folder: Path,
    quick: bool,
) -> Iterator[Row]:
    """For each number of users a call: the fastest form within the bound, beside both peers."""
    valid, test, judge = judged
    forms: dict[str, Any] = {}
    for which, model in models.items():
        for graph in FORMS:
            forms[f"{which} {graph}"] = formed(
                model, graph, data, folder / f"{name}-{which}".replace(" ", "-")
            )
    whole = judge(models["teacher"], valid).means["ndcg@10"]
    losses = {key: 1 - judge(model, valid).means["ndcg@10"] / whole for key, model in forms.items()}
    peers = {"eager": calls.plain, "onnxruntime-int8": default_int8(calls.plain, folder / f"{name}.peer")}
    forms["teacher bf16"] = halved(models["teacher"])
    losses["teacher bf16"] = 1 - judge(forms["teacher bf16"], valid).means["ndcg@10"] / whole
    torch.set_num_threads(THREADS)
    seconds = {
        users: raced({**forms, **peers}, calls.ask, calls.batches[users], rounds=3 if quick else 9)
        for users in USERS
    }
    measured = [Form(key, {users: seconds[users][key] for users in USERS}, losses[key]) for key in forms]
    before = judge(models["teacher"], test)
    for users in USERS:
        best = fastest(measured, users=users, bound=BOUND)
        report = judge(forms[best.name], test)
        lost = report.against(before, "ndcg@10")
        mean = before.means["ndcg@10"]
        given = {
            "form": best.name, "threads": THREADS, "users": users,
            "ndcg_loss": round(-lost.mean / mean, 5),
            "ndcg_loss_interval": [round(-bound / mean, 5) for bound in (lost.high, lost.low)],
            "ndcg_loss_valid": round(best.loss, 5),
            "forms": {
                form.name: [round(users / form.seconds[users], 1), round(form.loss, 5)] for form in measured
            },
        }  # fmt: skip
        for peer in PEERS:
            yield Row(
                name=f"{name}, {users} a call", work=work.name, metric="throughput",
                value=users / best.seconds[users], unit="users/s", peer=peer,
                peer_value=users / seconds[users][peer], given=given, seeds=(0,),
            )  # fmt: skip


def raced(
    forms: Mapping[str, Any], ask: Callable[[Any, Histories], Tensor], batches: list[Histories], rounds: int
) -> dict[str, float]:
    """Median seconds of a call of each, in turns; the first turn of each is its warm-up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, model in forms.items():
                for batch in batches:
                    before = time.perf_counter()
                    ask(model, batch)
                    if turn:
                        times[name].append(time.perf_counter() - before)
    return {name: statistics.median(found) for name, found in times.items()}


def kept_row(work: Work, name: str, report: Report, base: Report, given: Mapping[str, Any]) -> Row:
    """A student's NDCG@10 on the test split beside its teacher's."""
    mean, lost = report.interval("ndcg@10"), report.against(base, "ndcg@10")
    return Row(
        name=name, work=work.name, metric="ndcg@10", value=mean.mean, unit="mean over users", peer="teacher",
        peer_value=base.means["ndcg@10"], seeds=(0,), interval=(mean.low, mean.high),
        given={**given, "difference": [round(x, 5) for x in (lost.mean, lost.low, lost.high)]},
    )  # fmt: skip


# -- the forms -----------------------------------------------------------------------------------------


def served(model: Any) -> Any:
    """The model asked as `Recommender` asks it: one user at a time where scales follow the batch."""
    if model.network.alone:
        for name in ("encode", "score"):
            if hasattr(model, name):
                setattr(model, name, one_by_one(getattr(model, name)))
    return model


def one_by_one(ask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of each user alone."""

    def part(given: Any, b: int) -> Any:
        if isinstance(given, Mapping):
            return {name: values[b : b + 1] for name, values in given.items()}
        return None if given is None else given[b : b + 1]

    def asked(histories: Histories, *more: Any) -> Tensor:
        each = range(len(histories))
        return torch.cat([ask(histories.take([b]), *(part(given, b) for given in more)) for b in each])

    return asked


class Textbook(nn.Module):
    """An encoder that computes the state after every position, then takes the last."""

    def __init__(self, network: Encoder) -> None:
        super().__init__()
        self.inner = network

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        return Encoder.forward(self.inner, x_BLD, lengths_B)


def textbook(model: Any) -> Any:
    """The model with such an encoder, asked for the whole batch at once."""
    made = with_network(model, Textbook(model.network))
    made.encode = lambda histories: made.network(*made.inputs(histories))
    return made


def formed(model: Any, graph: Graph, data: Dataset, base: Path) -> Any:
    """The model with its network in this form."""
    if graph == "eager":
        return model
    path = base.with_name(f"{base.name}-{graph}.onnx")
    write_graph(
        path, model, graph, exported=base.with_suffix(".onnx"), samples=lambda: sample_inputs(model, data)
    )
    return served(with_network(model, OnnxNetwork(path, threads=THREADS)))


def default_int8(model: Any, path: Path) -> Any:
    """The model's network exported, and quantized as ONNX Runtime does it when nothing is asked for."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    whole = path.with_suffix(".whole.onnx")
    export_onnx(model.network, example_inputs(model)[:2], whole)
    with quiet():
        graph = onnx.load(str(whole))
        del graph.graph.value_info[:]  # of weights it is about to transpose: it fails on them
        quantize_dynamic(graph, str(path))
    made = with_network(model, OnnxNetwork(path, threads=THREADS))
    if "encode" in vars(model):
        made.encode = lambda histories: made.network(*made.inputs(histories))
    return made


class Half(nn.Module):
    """A network in bfloat16."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(network).bfloat16()

    def forward(self, *tensors: Tensor) -> Tensor:
        given = [t.bfloat16() if t.is_floating_point() else t for t in tensors]
        found: Tensor = self.inner(*given).float()
        return found


def halved(model: Any) -> Any:
    """The model with its network in bfloat16."""
    return with_network(model, Half(model.network))


def with_network(model: Any, network: nn.Module) -> Any:
    """A model that shares all but its network."""
    made = copy.copy(model)
    made._modules = {**model._modules, "network": network.eval()}
    return made


def histories_of(cases: Cases) -> dict[int, list[Histories]]:
    """Some of the users' histories in calls of each size, the same ones for every form."""
    order = np.random.default_rng(0).permutation(len(cases))
    counts = {1: 32, 64: 4}
    return {
        users: [cases.histories.take(order[i * users : (i + 1) * users]) for i in range(counts[users])]
        for users in USERS
    }


def trained(
    data: Dataset, name: str, words: tuple[str, ...], out: Path, retriever: Artefact | None = None
) -> Artefact:
    """The checkpoint at `out`; trained where it is not there."""
    if out.is_dir():
        return open_artefact(out, "checkpoint")
    say(f"training {out.name}")
    return train(data, recipe(name, list(words)), retriever=retriever, out=out)
