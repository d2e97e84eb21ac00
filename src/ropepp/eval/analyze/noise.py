"""``ropepp analyze noise``: does a model suffer more when its imaginary or its real heads are
disturbed by Gaussian noise on their rotated queries?

The hooks sit on the position layers and cost nothing once removed. Each draw is one noise, the same
for every strength and for both kinds of head. Intervals are over draws: they say what other noise
would have done to this model on these texts, not what another training seed or other texts would
give.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ropepp.data.tokenizer import decode_behind
from ropepp.errors import InputError
from ropepp.eval.analyze.heads import kinds_of
from ropepp.eval.analyze.output import COLORS, canvas, draw_intervals, save
from ropepp.eval.analyze.rows import BATCH_TOKENS, LENGTH, RECALL_UNIT, read_rows, recall_batch
from ropepp.eval.generated import encoded_samples, tasks_of
from ropepp.eval.likelihood import score_continuations
from ropepp.generate.decode import complete
from ropepp.interop.saved import SavedModel
from ropepp.model.transformer import Transformer
from ropepp.statistics import compare, sample_sd, t_interval
from ropepp.train.evaluation import model_inputs

# (kind, layer, shape of the queries of that kind (B, T, heads, D)) -> standard normal noise
NoiseSource = Callable[[str, int, torch.Size], Tensor]
KINDS = ("real", "imaginary")
# What lines of the table have for people, with the ends of its interval.
ENDS = {kind: (f"{kind}_low", f"{kind}_high") for kind in KINDS} | {"difference": ("low", "high")}
NO_END = -1  # no token
NAMES = ("loss", "perplexity", "accuracy")
Measure = Callable[[], Mapping[str, float]]
Values = dict[tuple[str, float], dict[int, float]]  # by kind, standard deviation and draw
UNITS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "accuracy": "accuracy of the answers",
    "score": "RULER score",
}


class UnitNoise:
    """Standard normal noise that depends on a seed, the layer and the number of the forward pass
    alone.

    It is the same for every standard deviation, and for real and imaginary heads where a layer has
    as many of both. One object serves one evaluation. The seed is numbers from 0 on.
    """

    def __init__(self, *seed: int) -> None:
        self.seed = seed
        self._passes: Counter[tuple[str, int]] = Counter()

    def __call__(self, kind: str, layer: int, shape: torch.Size) -> Tensor:
        entropy = [*self.seed, layer, self._passes[kind, layer]]
        self._passes[kind, layer] += 1
        state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        # On the CPU: the same numbers whatever the model's device.
        return torch.randn(shape, generator=torch.Generator().manual_seed(state >> 1))


@contextmanager
def noisy_queries(model: Transformer, std: float, kind: str, noise: NoiseSource) -> Iterator[None]:
    """Inside the context, adds noise to the queries of the real or imaginary heads of all layers;
    ``std`` is in units of the rotated queries."""
    heads = kinds_of(model.layout)[kind]

    def add(
        layer: int, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        q, k = output[0].clone(), output[1]
        unit = noise(kind, layer, q[:, :, heads].shape)
        q[:, :, heads] += (std * unit).to(q.device, q.dtype)
        return q, k

    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks()):
            hook = partial(add, layer)
            hooks.enter_context(block.self_attn.position.register_forward_hook(hook))
        yield


def noise_study(
    model: Transformer, measure: Measure, stds: Sequence[float], draws: int, seed: int = 0
) -> tuple[dict[str, float], dict[str, Values]]:
    """Measures a model without noise, and with so many draws of noise of each standard deviation,
    in units of the rotated queries, on each kind of head; returns the metrics without noise, and
    for each metric its values. ``measure`` makes the same forward passes in the same order every
    time, or the draws are not paired. An `InputError` if the model lacks a kind of head, a standard
    deviation is negative or given twice, or there are fewer than 2 draws."""
    if draws < 2:
        raise InputError(f"draws is {draws}; an interval needs at least 2")
    if not stds or not all(std >= 0 for std in stds) or len(set(stds)) < len(stds):
        raise InputError(f"stds are {list(stds)}; allowed are numbers from 0 on, each once")
    for kind in KINDS:
        if kind not in kinds_of(model.layout):
            raise InputError(
                f"the position is {type(model.position).__name__}, which has no {kind} heads: noise"
                " compares real and imaginary heads, as RoPE++ (RoPEppEC, RoPEppEH) has them"
            )
    clean = dict(measure())
    values: dict[str, Values] = {key: {} for key in clean}
    for draw in range(draws):
        for std in stds:
            for kind in KINDS:
                with noisy_queries(model, std, kind, UnitNoise(seed, draw)):
                    found = measure()
                for key, value in found.items():
                    values[key].setdefault((kind, std), {})[draw] = value
    return clean, values


@torch.no_grad()
def mean_loss(
    model: Transformer, ids: Tensor, targets: Tensor, names: Sequence[str] = NAMES
) -> dict[str, float]:
    """Of rows (B, T), each a document, the mean cross entropy of the targets in nats, its
    exponential, and their accuracy: those of ``names``, in this order."""
    device = model.embed_tokens.weight.device
    losses, right, count = 0.0, 0, 0
    step = max(1, BATCH_TOKENS // ids.shape[1])
    for some, wanted in zip(ids.split(step), targets.split(step), strict=True):
        nll, hits = model.evaluate(some.to(device), wanted.to(device))
        losses += float(nll.cpu().double().sum())
        right += int(hits.sum())
        count += int((wanted != model.ignore_index).sum())
    loss = losses / count
    found = {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": right / count}
    return {name: found[name] for name in names}


def text_measure(saved: SavedModel, options: Namespace) -> tuple[Measure, dict[str, Any]]:
    """Loss and perplexity on rows of text."""
    text = read_rows(saved, options.rows, options.length, options.text, options.tokenizer)
    if text.unit == RECALL_UNIT:
        raise InputError(
            f"{saved.path} was trained on recall, whose filler is random: give --metric recall, or"
            " --text"
        )
    measure = partial(mean_loss, saved.model, text.inputs, text.ids[:, 1:], ("loss", "perplexity"))
    rows, length = text.inputs.shape
    return measure, {"text": text.source, "unit": text.unit, "rows": rows, "length": length}


def recall_measure(saved: SavedModel, options: Namespace) -> tuple[Measure, dict[str, Any]]:
    """Accuracy and loss of the answers of associative recall, in rows of the trained length."""
    batch = recall_batch(saved, options.rows, options.length, options.seed)
    rows, length = batch["input_ids"].shape
    measure = partial(mean_loss, saved.model, *model_inputs(batch)[:2], ("accuracy", "loss"))
    return measure, {"text": "associative recall", "rows": rows, "length": length}


def ruler_measure(saved: SavedModel, options: Namespace) -> tuple[Measure, dict[str, Any]]:
    """Loss of the answers to RULER's tasks in nats per token, as `ropepp.eval.generated` has it,
    and scores of greedy answers. An `InputError` if there is no such task, or it does not fit."""
    known = {task.name: task for task in tasks_of("ruler", options.data, options.protocol)}
    if missing := [name for name in options.tasks if name not in known]:
        raise InputError(f"--tasks has {missing[0]!r}; allowed: {', '.join(known)}")
    tokenizer = saved.tokenizer(options.tokenizer)
    length = options.length or saved.data_arguments.get("sequence_length", LENGTH)
    samples = [
        (known[name], sample)
        for name in options.tasks
        for sample in encoded_samples(known[name], tokenizer, length, options.rows, options.seed)
    ]
    count = sum(len(ids) for _, sample in samples for ids in sample.answers)

    def measure() -> dict[str, float]:
        losses, scores = 0.0, 0.0
        for task, (sample, prompt, answers, _) in samples:
            losses += sum(score_continuations(saved.model, prompt, answers, BATCH_TOKENS))
            # To the last token, or the next sample's noise would depend on where this one ends.
            said = complete(saved.model, [prompt], task.max_new_tokens, NO_END)[0]
            said = said[: [*said, tokenizer.eot_id].index(tokenizer.eot_id)]
            scores += task.score(decode_behind(tokenizer, prompt, said), sample)["score"]
        return {"loss": losses / count, "score": scores / len(samples)}

    names = f"RULER, {options.protocol} ({', '.join(options.tasks)})"
    return measure, {"text": names, "rows": len(samples), "length": length}


def effects(clean: Mapping[str, float], values: Mapping[str, Values]) -> list[dict[str, Any]]:
    """A table of what noise does, for each metric and standard deviation: lines with ``metric``,
    ``std``, ``draws``, ``clean``; of ``real`` and ``imaginary`` the mean change through noise with
    the ends of its 95% t interval; ``difference``, the mean over draws of the change through noise
    on imaginary less that through noise on real heads, with its plain interval, its p corrected for
    the standard deviations of this metric (Holm) and a verdict, see `ropepp.statistics`."""
    table = []
    for metric, own in values.items():
        stds = list(dict.fromkeys(std for _, std in own))
        differences: dict[str, dict[int, float]] = {"none": {}}
        for std in stds:
            real, imaginary = own["real", std], own["imaginary", std]
            differences["none"] |= dict.fromkeys(real, 0.0)
            differences[str(std)] = {draw: imaginary[draw] - real[draw] for draw in real}
        compared = compare(differences, "none")
        for std in stds:
            line: dict[str, Any] = {"metric": metric, "std": std, "draws": len(own["real", std])}
            line["clean"] = clean[metric]
            for kind in KINDS:
                changes = [value - clean[metric] for value in own[kind, std].values()]
                mean, sd = float(np.mean(changes)), sample_sd(changes) or 0.0
                low, high = t_interval(mean, sd, len(changes))
                line |= {kind: mean, f"{kind}_low": low, f"{kind}_high": high}
            one = compared[str(std)]
            low, high = one.interval or (one.mean or 0.0,) * 2
            line |= {"difference": one.mean, "low": low, "high": high}
            table.append(line | {"p_holm": one.p_holm, "verdict": one.verdict})
    return table


def analyze(saved: SavedModel, options: Namespace) -> None:
    """The command; see ``ropepp analyze noise --help``."""
    make = {"perplexity": text_measure, "recall": recall_measure, "ruler": ruler_measure}
    measure, facts = make[options.metric](saved, options)
    clean, values = noise_study(saved.model, measure, options.stds, options.draws, options.seed)
    table = effects(clean, values)
    kinds = kinds_of(saved.model.layout)
    heads = {kind: len(kinds[kind]) for kind in KINDS}
    facts = {"model": saved.name, "step": saved.step, **facts, "seed": options.seed}
    facts["disturbed_heads_of_a_layer"] = heads
    facts["equal_number_of_heads"] = heads["real"] == heads["imaginary"]
    print("\n".join(summary(saved.name, table, facts)))
    scalars: dict[str, dict[int, float]] = {}
    for line in table:
        for kind in ENDS:
            of_kind = scalars.setdefault(f"noise/{line['metric']}/{kind}", {})
            of_kind[round(1000 * line["std"])] = line[kind]
    name = "noise" if options.metric == "perplexity" else f"noise_{options.metric}"
    shown = next(iter(clean))
    lines = [line for line in table if line["metric"] == shown]
    save(options.out, name, table, facts, {name: partial(draw, lines)}, scalars)


def summary(name: str, table: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    """The table for people."""
    heads = facts["disturbed_heads_of_a_layer"]
    equal = "as many" if facts["equal_number_of_heads"] else "NOT as many, so not a fair comparison"
    lines = [
        f"{name}: {facts['rows']} rows of {facts['length']} tokens, {facts['text']}",
        f"noise on {heads['real']} real or {heads['imaginary']} imaginary heads of each layer"
        f" ({equal}); changes with 95% intervals over {table[0]['draws']} draws",
    ]
    for metric in dict.fromkeys(line["metric"] for line in table):
        own = [line for line in table if line["metric"] == metric]
        lines += ["", f"{metric}, {own[0]['clean']:.5g} without noise"]
        lines.append(f"{'std':>5} {'real':>30} {'imaginary':>30} {'imaginary - real':>30}")
        for line in own:
            cells = [
                f"{line[key]:+.4g} ({line[low]:+.4g} {line[high]:+.4g})"
                for key, (low, high) in ENDS.items()
            ]
            columns = " ".join(f"{cell:>30}" for cell in cells)
            lines.append(f"{line['std']:>5g} {columns}  {line['verdict']}")
    return [*lines, ""]


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Change of the first metric over the noise, by kind, and the paired difference."""
    metric = lines[0]["metric"]
    x = np.array([line["std"] for line in lines])
    with canvas(path, 15, 6.5) as figure:
        left, right = figure.subplots(1, 2)
        styles = zip((left, left, right), COLORS[:3], ("o-", "s-", "D-"), strict=True)
        for (key, ends), (panel, color, fmt) in zip(ENDS.items(), styles, strict=True):
            label = f"noise on {key} heads"
            draw_intervals(panel, x, lines, (key, *ends), fmt=fmt, color=color, label=label)
        left.legend()
        left.set_title(f"change of {UNITS[metric]}")
        right.set_title("imaginary $-$ real, same noise")
        for panel in (left, right):
            panel.axhline(0, color="#808080", linewidth=0.8)
            panel.set_xlabel("standard deviation of the noise")
