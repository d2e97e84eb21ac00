"""``ropepp generate``."""

import json
import os
import sys
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ropepp.data.text.readers import read_column, read_text, require_text
from ropepp.errors import InputError
from ropepp.files import DiskError, require_free, require_writable, write_text
from ropepp.generate.sampling import Sampling
from ropepp.options import Parser, positive, seed


def main(args: list[str]) -> None:
    """Continues prompts; ``args`` are those after ``ropepp generate``."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see `ropepp.commands.fit`
    options = _parser().parse_args(args)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    prompts = _prompts(options)
    if options.out:
        require_free(options.out)
        require_writable(options.out)
    import torch
    from tqdm import tqdm

    from ropepp.generate.text import continue_texts
    from ropepp.interop.saved import open_model, placement

    device, dtype = placement(options.device, options.dtype)
    saved = open_model(options.ckpt, dtype, device)
    tokenizer = saved.tokenizer(options.tokenizer)
    generator = torch.Generator(device).manual_seed(options.seed)
    alone = options.out is None and len(prompts) == 1
    show = partial(print, end="", flush=True)
    if alone:
        show(prompts[0])
    lines: list[str] = []
    batches = range(0, len(prompts), options.batch_size)
    for start in tqdm(batches, desc="batches", disable=len(batches) == 1):
        batch = prompts[start : start + options.batch_size]
        found, speed = continue_texts(
            saved.model, tokenizer, batch, options.max_new_tokens, sampling, generator,
            options.stop, show if alone else None,
        )  # fmt: skip
        lines += [json.dumps(asdict(one), ensure_ascii=False) for one in found]
    if options.out:
        text = "\n".join(lines) + "\n"
        try:
            write_text(options.out, text)
        except DiskError:
            show(text)  # the work is done: it must not be lost
            raise
    else:
        print("" if alone else "\n".join(lines))
    print(f"{'last batch: ' if len(batches) > 1 else ''}{speed}", file=sys.stderr)


def _prompts(options: Namespace) -> list[str]:
    prompts = [require_text(prompt, "--prompt") for prompt in options.prompt]
    if not all(require_text(stop, "--stop") for stop in options.stop):
        raise InputError("--stop is ''; it must be a text that is not empty")
    if options.file:
        if not options.file.is_file():
            raise InputError(f"{options.file} is no file of prompts")
        if options.file.suffix.lower() == ".jsonl":
            prompts += read_column(options.file, "prompt")
        else:
            # Lines end with line feeds alone: a prompt may hold what else is called a line end.
            lines = [line.removesuffix("\r") for line in read_text(options.file).split("\n")]
            prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise InputError("there is no prompt: give --prompt TEXT or --file FILE")
    return prompts


def _parser() -> Parser:
    parser = Parser(
        "ropepp generate",
        description="Continues prompts. One prompt is shown as it grows; several give a JSON line "
        "each.",
    )
    add = parser.add_argument
    text = "a run, a checkpoint, a published or exported folder, hub:NAME[@REVISION]"
    add("--ckpt", required=True, help=text)
    add("--prompt", action="append", default=[], help="may be repeated")
    add("--file", type=Path, help='a prompt a line, or .jsonl lines with "prompt"')
    add("--max_new_tokens", type=positive, default=100)
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--top_k", type=int, help="draw among the k likeliest tokens")
    add("--top_p", type=float, help="draw among the likeliest that reach this probability")
    add("--seed", type=seed, default=0)
    add("--stop", action="append", default=[], help="text that ends; may be repeated")
    add("--batch_size", type=positive, default=8, help="prompts of a file at a time")
    add("--tokenizer", help="file, folder or 'bytes'; otherwise the model's own")
    add("--device", help="cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on cuda, float32 on cpu")
    add("--out", type=Path, help="file for the JSON lines")
    return parser
