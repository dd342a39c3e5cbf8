# SPDX-License-Identifier: MIT
"""Step 2 of RLHF: train a reward model on preference pairs with DeepSpeed and critic.py.

Without arguments a small critic learns, offline, to tell Python's reference manual from a copy
in which some words are written backwards.
"""

import argparse
import fcntl
import gzip
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from array import array
from hashlib import file_digest, sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, logging

from critic import create_critic_model, on_rank_0, save_critic_model


class Row(NamedTuple):
    prompt: str  # finds the pairs of a prompt; may be empty
    texts: list[str]  # complete texts, from best to worst
    is_text: bool  # False for a rendered chat template, which writes BOS itself


class Pair(NamedTuple):
    prompt: bytes  # a hash
    chosen: array  # token ids
    rejected: array
    shared: int  # tokens of the common prefix


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model_name_or_path", help="decoder or reward model: folder or hub id (omit for the demo)"
    )
    add("--data_path", nargs="+", help="pairs: .jsonl or .jsonl.gz files (omit for the demo)")
    add("--eval_path", nargs="+", help="held-out pairs (else those of 10%% of the prompts)")
    add("--max_seq_len", type=int, default=512, help="tokens; pairs with a longer text are dropped")
    add("--num_train_epochs", type=int, default=1, help="passes over the data")
    add("--output_dir", default="output", help="where critic, metrics.jsonl and checkpoints go")
    add("--seed", type=int, default=1234, help="for the value head, the order of the data, dropout")
    add("--dropout", type=float, help="overrides every dropout probability of the model")
    add("--compute_fp32_loss", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--loss_on",
        choices=["tokens", "end"],
        default="tokens",
        help="every response token, or EOS",
    )
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--eval_interval", type=int, default=0, help="steps between evaluations (0: start and end)")
    add("--save_interval", type=int, default=0, help="steps between checkpoints (0: none)")
    add("--eval_only", action="store_true", help="only evaluate a reward model on --eval_path")
    add("--resume", action="store_true", help="from the newest checkpoint in --output_dir, if any")
    add("--deepspeed_config", default=str(Path(__file__).with_name("ds_config.json")))
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    data = args.eval_path if args.eval_only else args.data_path
    if bool(args.model_name_or_path) != bool(data) or (args.eval_only and not data):
        parser.error("give --model_name_or_path and --data_path (with --eval_only: --eval_path)")
    return args


def fail(problem):
    """Exit with one line. Every rank calls it."""
    sys.exit(f"train_reward.py: error: {' '.join(str(problem).split())}")


def start_ranks():
    if "RANK" not in os.environ:  # without a launcher
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            fail("SLURM started several tasks without ranks: launch deepspeed or torchrun")
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT="0")  # any free port
    deepspeed.init_distributed()
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    logging.set_verbosity_error()  # else transformers warns that the head is newly initialised
    # Also where activations are recomputed: cuDNN's attention gives NaN gradients (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)


def progress(items=None, **options):
    """A progress bar on rank 0."""
    return tqdm(
        items,
        disable=dist.is_initialized() and dist.get_rank() > 0,
        mininterval=5,
        delay=2,
        **options,
    )


def read_ds_config(path):
    try:
        ds_config = json.loads(Path(path).read_text(encoding="utf-8"))
        DeepSpeedConfig(ds_config)
    except (OSError, ValueError, AssertionError, DeepSpeedConfigError) as error:
        fix = "pass JSON for DeepSpeed, like ds_config.json"
        raise ValueError(f"--deepspeed_config {path}: {fix} ({error})") from error
    if "optimizer" not in ds_config:
        raise ValueError(f"--deepspeed_config {path}: add an optimizer, as in ds_config.json")
    return ds_config


def load_model(args, ds_config):
    path = args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{path}: the tokenizer has no EOS token, with which every text ends: set it"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # A model that is only evaluated has no embedding for a new token; the mask hides its PAD.
        pad_token = tokenizer.eos_token if args.eval_only else "[PAD]"
        tokenizer.add_special_tokens({"pad_token": pad_token})
    torch.manual_seed(args.seed)  # for a newly initialised head
    model = create_critic_model(
        path,
        tokenizer,
        ds_config,
        rlhf_training=args.eval_only,
        dropout=args.dropout,
        compute_fp32_loss=args.compute_fp32_loss,
        loss_on=args.loss_on,
    )
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    if args.max_seq_len > limit:
        raise ValueError(f"--max_seq_len is {args.max_seq_len}, but {path} has {limit} positions")
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenizer


# ---- data ----


def drop_nulls(item):
    """Datasets from Arrow files have all keys in every message; templates ask which are there."""
    if "role" not in item:
        return item
    return {key: value for key, value in item.items() if value is not None}


def check(name, value):
    """Raise ValueError unless value is a text or messages, whose content a template checks."""
    is_message = lambda item: isinstance(item, dict) and isinstance(item.get("role"), str)
    is_messages = isinstance(value, list) and value and all(map(is_message, value))
    is_text = isinstance(value, str) and value.strip()
    if not is_messages and not is_text:
        found = json.dumps(value)[:50]
        raise ValueError(
            f'"{name}" is {found}; pass a text, or a list of {{"role", "content"}} messages'
        )


def parse_row(row, tokenizer):
    """A line in one of the README's forms, as a Row. Raises ValueError, or the template's error."""
    if not isinstance(row, dict):
        raise ValueError("pass an object with the keys of the README")
    responses = {name: row.get(name) for name in ("chosen", "rejected")}
    ranked = row.get("ranked")
    if isinstance(ranked, list) and len(ranked) > 1:
        responses = {f"ranked {place}": response for place, response in enumerate(ranked, 1)}
    for name, response in responses.items():
        check(name, response)
    prompt = row.get("prompt") or None
    if isinstance(prompt, list):
        check("prompt", prompt)
    forms = {type(part) for part in [prompt, *responses.values()] if part is not None}
    if len(forms) > 1:
        fix = 'delete "prompt" where the dialogues are complete'
        raise ValueError(f"texts and messages are mixed: {fix}")
    if str in forms:
        texts = [(prompt or "") + response for response in responses.values()]
        return Row(find_prompt(prompt, texts), texts, is_text=True)
    dialogues = [(prompt or []) + response for response in responses.values()]
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    options = {"tools": tools, "tokenize": False}
    texts = [tokenizer.apply_chat_template(dialogue, **options) for dialogue in dialogues]
    turns = [[json.dumps(turn, sort_keys=True) for turn in dialogue] for dialogue in dialogues]
    return Row("".join(os.path.commonprefix(turns)), texts, is_text=False)


def find_prompt(prompt, texts):
    """The prompt without HH-RLHF's last "Assistant:", or else what the texts share, by lines."""
    if prompt is not None:
        return prompt.strip().removesuffix("Assistant:") or prompt
    common = os.path.commonprefix(texts)
    for mark in ("\n\nAssistant:", "\n"):
        if mark in common:
            return common.rpartition(mark)[0]
    return common


def read_rows(paths, tokenizer):
    """Yield the rows of .jsonl[.gz] files. Raises ValueError, which names file and line."""
    for path in paths:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rb") as lines:
            for number, line in enumerate(progress(lines, desc=f"reading {path}"), 1):
                if not line.strip():
                    continue
                try:
                    row = parse_row(json.loads(line, object_hook=drop_nulls), tokenizer)
                    "".join(row.texts).encode()  # a lone surrogate raises here
                except (ValueError, TypeError, RecursionError, TemplateError) as error:
                    raise ValueError(f"{path}:{number}: {str(error)[:150]}") from error
                yield row


def tokenize(texts, is_text, tokenizer):
    """{text: token ids}. EOS is appended to texts that do not end with it, whitespace aside."""
    encoded = tokenizer(texts, add_special_tokens=is_text, return_attention_mask=False)
    tokens = {}
    for text, ids in zip(texts, encoded["input_ids"]):
        has_eos = ids[-1:] == [tokenizer.eos_token_id]
        if not has_eos and not text.rstrip().endswith(tokenizer.eos_token):
            ids.append(tokenizer.eos_token_id)
        tokens[text] = array("i", ids)  # 4 bytes per token
    return tokens


def read_pairs(paths, tokenizer, max_seq_len):
    """Read all pairs. Long texts are dropped, since truncation would cut their responses."""
    pairs = []
    dropped = 0
    without_prompt = 0
    for is_text, rows in itertools.groupby(read_rows(paths, tokenizer), lambda row: row.is_text):
        while batch := list(itertools.islice(rows, 500)):  # fast tokenizers use threads on a batch
            tokens = tokenize([text for row in batch for text in row.texts], is_text, tokenizer)
            for row in batch:
                prompt = sha256(row.prompt.strip().encode()).digest()[:8]
                for chosen, rejected in itertools.combinations([tokens[t] for t in row.texts], 2):
                    if chosen == rejected or max(len(chosen), len(rejected)) > max_seq_len:
                        dropped += 1
                        continue
                    shared = len(os.path.commonprefix([chosen.tolist(), rejected.tolist()]))
                    pairs.append(Pair(prompt, chosen, rejected, shared))
                    without_prompt += not row.prompt
    what = f"dropped {dropped} that are identical or longer than {max_seq_len} tokens"
    print(f"{', '.join(paths)}: {len(pairs)} pairs; {what}", flush=True)
    if without_prompt:
        fix = 'if another key holds it, rename that to "prompt"'
        print(f"warning: {without_prompt} pairs have no prompt or common prefix: {fix}")
    if not pairs:
        raise ValueError(
            f"{paths[0]}: no pairs remain ({what}): pass more, or a larger --max_seq_len"
        )
    return pairs


def read_data(args, tokenizer):
    """The pairs to train on, and the held-out ones: --eval_path's, or a tenth of the prompts."""
    train_pairs = []
    if not args.eval_only:
        train_pairs = read_pairs(args.data_path, tokenizer, args.max_seq_len)
    if args.eval_path:
        return train_pairs, read_pairs(args.eval_path, tokenizer, args.max_seq_len)
    held_out = set(sorted({pair.prompt for pair in train_pairs})[::10])
    eval_pairs = [pair for pair in train_pairs if pair.prompt in held_out]
    return [pair for pair in train_pairs if pair.prompt not in held_out], eval_pairs


def shuffle_prompts(pairs, seed):
    """The pairs of a prompt stay together, to overfit less (InstructGPT, section 3.5)."""
    rng = random.Random(seed)
    place = {prompt: rng.random() for prompt in dict.fromkeys(pair.prompt for pair in pairs)}
    return sorted(pairs, key=lambda pair: place[pair.prompt])


def count_tokens(pairs):
    """Tokens of the pairs of a prompt, where the prefix that all share counts once."""
    rows = {row.tobytes() for pair in pairs for row in (pair.chosen, pair.rejected)}
    shared = min(pair.shared for pair in pairs)
    return shared + sum(len(row) // 4 - shared for row in rows)


def deal(pairs, ranks):
    """Give ranks equally many pairs and similar token counts: large prompts first."""
    size = len(pairs) // ranks
    dealt = [[] for _ in range(ranks)]
    loads = [0] * ranks
    prompts = [list(group) for _, group in itertools.groupby(pairs, lambda pair: pair.prompt)]
    for group in sorted(prompts, key=count_tokens, reverse=True):
        while group:
            room = [size - len(part) for part in dealt]
            free = [rank for rank in range(ranks) if room[rank]]
            rank = min(free, key=lambda rank: (room[rank] < len(group), loads[rank]))
            part = group[: room[rank]]
            group = group[room[rank] :]
            dealt[rank] += part
            loads[rank] += count_tokens(part)
    return dealt


def collate(pairs, pad_id):
    """(2B, T) each, on the CPU, where the model removes padding before it sends the rest."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids = [torch.frombuffer(row, dtype=torch.int32) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.int32) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }


def batches_of_rank(pairs, engine, args, pad_id):
    """For each step that is left, yield this rank's micro-batches."""
    pairs_per_step = engine.train_batch_size()
    micro_batch = engine.train_micro_batch_size_per_gpu()
    skip = engine.global_steps
    for epoch in range(args.num_train_epochs):
        shuffled = shuffle_prompts(pairs, args.seed + epoch)
        for start in range(0, len(pairs) - pairs_per_step + 1, pairs_per_step):
            if skip > 0:
                skip -= 1
                continue
            dealt = deal(shuffled[start : start + pairs_per_step], dist.get_world_size())
            mine = dealt[dist.get_rank()]
            starts = range(0, len(mine), micro_batch)
            yield [collate(mine[at : at + micro_batch], pad_id) for at in starts]


def demonstration(folder, seed):
    """Write a small Llama and pairs: passages of Python's manual, and some words backwards."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    rng = random.Random(seed)
    rows = []
    for topic in sorted(topics):
        words = topics[topic].split()
        for at in range(0, len(words) - 39, 90):
            prompt = words[at : at + 12]
            response = words[at + 12 : at + 40]
            garbled = [word[::-1] if rng.random() < 0.25 else word for word in response]
            rows.append(
                {"chosen": " ".join(prompt + response), "rejected": " ".join(prompt + garbled)}
            )
    bpe = ByteLevelBPETokenizer()
    texts = [row["chosen"] for row in rows]
    bpe.train_from_iterator(texts, 2048, special_tokens=["<pad>", "<eos>"], show_progress=False)
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaModel(config).save_pretrained(folder)
    (folder / "manual.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def make_engine(model, ds_config, pairs, args):
    pairs_per_step = DeepSpeedConfig(ds_config).train_batch_size
    steps = args.num_train_epochs * (len(pairs) // pairs_per_step)
    if steps < 1 and not args.eval_only:
        found = f"{len(pairs)} training pairs and {args.num_train_epochs} epochs"
        raise ValueError(f"{found} give no step of {pairs_per_step} pairs: pass more data")
    schedule = ds_config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = max(steps, schedule.get("warmup_num_steps", 0) + 1)
    return deepspeed.initialize(model=model, config=ds_config)[0]


# ---- output ----


def newest_checkpoint(folder):
    """Rank 0's view: a shared disk may show other ranks an older listing."""
    return on_rank_0(lambda: max(folder.glob("checkpoints/step-*"), default=None))


def check_output_dir(folder, args):
    """Raise ValueError if the folder holds anything but the run to resume."""
    if args.eval_only:
        return
    names = on_rank_0(lambda: sorted(os.listdir(folder)) if folder.exists() else [])
    if args.resume:
        newest = newest_checkpoint(folder)
        names = [name for name in names if name == "config.json" and not newest]
    if names:
        fix = "pass another --output_dir, or --resume a run with checkpoints"
        raise ValueError(f"{folder} holds {names[0]}: {fix}")


def open_metrics(folder):
    """Open and lock metrics.jsonl on rank 0, because ranks may outlive a launcher."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "metrics.jsonl" if dist.get_rank() == 0 else os.devnull, "a")
    try:
        on_rank_0(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {folder}: end it first") from error
    return file


def fingerprint(args, ds_config):
    """What a resumed run must have in common with the interrupted one."""
    settings = ds_config | {"number of ranks": dist.get_world_size()}
    names = "model_name_or_path seed num_train_epochs dropout loss_on max_seq_len compute_fp32_loss"
    for name in names.split():
        settings[name] = getattr(args, name)
    for name in ("data_path", "eval_path"):
        settings[name] = []
        for path in getattr(args, name) or []:
            with open(path, "rb") as file:
                settings[name].append(file_digest(file, "sha256").hexdigest())
    return settings


def resume_run(engine, folder, settings, file):
    """Load the newest checkpoint, if any, and cut metrics.jsonl to the lines that it knows."""
    newest = newest_checkpoint(folder)
    written = 0
    if newest:
        print(f"resuming from {newest}; if it cannot be read, delete it", flush=True)
        before, written = json.loads((newest / "run.json").read_text())
        changed = [name for name in before | settings if before.get(name) != settings.get(name)]
        if changed:
            fix = "undo that, or start over"
            raise ValueError(f"--resume: {', '.join(changed)} changed since {newest}: {fix}")
        engine.load_checkpoint(str(newest.parent), newest.name)
    on_rank_0(lambda: file.truncate(min(written, file.tell())))


def save_checkpoint(engine, folder, settings, file):
    """Write a checkpoint, rename it once it is complete, and delete all but the newest two."""

    def finish():
        (folder / "unfinished" / "run.json").write_text(json.dumps([settings, file.tell()]))
        os.replace(folder / "unfinished", folder / f"step-{engine.global_steps:09d}")
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    engine.save_checkpoint(str(folder), "unfinished", save_latest=False)
    on_rank_0(finish)


def log(engine, file, metrics):
    step = engine.global_steps
    print(json.dumps({"step": step} | metrics), file=file, flush=True)
    events = [(f"Train/{name}", x, step) for name, x in metrics.items() if x is not None]
    engine.monitor.write_events(events)
    if "eval_loss" in metrics:
        values = ", ".join(f"{name} {x:.4g}" for name, x in metrics.items())
        print(f"\nstep {step}: {values}", flush=True)


# ---- training ----


def pair_metrics(output):
    """Loss, accuracy (0.5 for a tie), margin and both scores per pair: (5, B), on the device."""
    loss, chosen, rejected = (value.detach().double() for value in output.values())
    margin = chosen - rejected
    return torch.stack([loss.expand_as(margin), (margin.sign() + 1) / 2, margin, chosen, rejected])


@torch.no_grad()
def evaluate(engine, pairs, pad_id):
    """Means of the metrics, the same on any number of ranks."""
    size = engine.train_micro_batch_size_per_gpu()
    results = torch.zeros(5, len(pairs), dtype=torch.float64, device=engine.device)
    engine.eval()
    starts = range(0, len(pairs), size * dist.get_world_size())
    for start in progress(starts, desc="evaluating", leave=False):
        first = start + dist.get_rank() * size
        mine = pairs[first : first + size]
        output = engine(**collate(mine or pairs[:1], pad_id))  # under ZeRO-3 no rank may be idle
        results[:, first : first + size] = pair_metrics(output)[:, : len(mine)]
    engine.train()
    dist.all_reduce(results)
    if not results.isfinite().all():
        fail(f"step {engine.global_steps}: the held-out loss is not finite: check the data, the lr")
    names = ("loss", "accuracy", "margin", "chosen_score", "rejected_score")
    means = {f"eval_{name}": mean for name, mean in zip(names, results.mean(1).tolist())}
    return means | {"eval_ties": int((results[1] == 0.5).sum())}


def run_batches(engine, batches, seed):
    """Forward and backward of a step. Returns sums of loss, accuracy and margin: (3,)."""
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(batches):
        # Dropout depends on seed, step and rank only, so that a resumed run draws the same.
        torch.manual_seed(seed + number * dist.get_world_size())
        output = engine(**batch)
        engine.backward(output["loss"])
        if number + 1 < len(batches):
            engine.step()  # counts the micro-batch; the optimizer steps after the last one
        sums += pair_metrics(output)[:3].sum(1)
    return sums


def check_finite(value, what, folder):
    """Stop unless a value that all ranks share is finite."""
    if not math.isfinite(value):
        newest = newest_checkpoint(folder) or "none, see --save_interval"
        fix = f"check the data, or lower the learning rate; last checkpoint: {newest}"
        fail(f"{what} is not finite: {fix}")


def gradient_norm(engine):
    """Of the last step: None if DeepSpeed does not give it, NaN if it skipped the step."""
    if engine.was_step_applied():
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        return None  # fp16 skips steps while it seeks its loss scale
    return math.nan


def main():
    args = parse_args()
    start_ranks()
    folder = Path(args.output_dir)
    try:
        ds_config = read_ds_config(args.deepspeed_config)
        check_output_dir(folder, args)
        if args.model_name_or_path is None:
            args.model_name_or_path = f"{folder}/demo"
            args.data_path = [f"{folder}/demo/manual.jsonl"]
            on_rank_0(lambda: demonstration(folder / "demo", args.seed))
        model, tokenizer = load_model(args, ds_config)
        train_pairs, eval_pairs = read_data(args, tokenizer)
        engine = make_engine(model, ds_config, train_pairs, args)
        if not args.eval_only:
            settings = fingerprint(args, ds_config)
            file = open_metrics(folder)
            resume_run(engine, folder, settings, file)
    except (OSError, ValueError) as error:  # bad input; anything else keeps its traceback
        fail(error)
    pad_id = tokenizer.pad_token_id
    if args.eval_only:
        print(json.dumps(evaluate(engine, eval_pairs, pad_id)))
        return
    pairs_per_step = engine.train_batch_size()
    epoch_steps, unused = divmod(len(train_pairs), pairs_per_step)
    total_steps = args.num_train_epochs * epoch_steps
    print(f"{epoch_steps} steps per epoch; {unused} pairs, others in each epoch, are not used")
    if engine.global_steps == 0:
        log(engine, file, evaluate(engine, eval_pairs, pad_id))
    batches = batches_of_rank(train_pairs, engine, args, pad_id)
    batch = next(batches, None)
    bar = progress(initial=engine.global_steps, total=total_steps, desc="training")
    for step in range(engine.global_steps + 1, total_steps + 1):
        began = time.perf_counter()
        sums = run_batches(engine, batch, args.seed + step * pairs_per_step + dist.get_rank())
        batch = next(batches, None)  # dealt and collated while the device still works
        dist.all_reduce(sums)
        loss, accuracy, margin = (sums / pairs_per_step).tolist()  # the one sync before the step
        check_finite(loss, f"step {step}: the loss", folder)
        engine.step()
        norm = gradient_norm(engine)
        check_finite(norm or 0.0, f"step {step}: the gradient", folder)
        metrics = {
            "epoch": step / epoch_steps,
            "loss": loss,
            "accuracy": accuracy,
            "margin": margin,
            "grad_norm": norm,
            "learning_rate": engine.get_lr()[0],
            "skipped_steps": engine.skipped_steps,
            "pairs_per_second": pairs_per_step / (time.perf_counter() - began),
        }
        log(engine, file, metrics)
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}", refresh=False)
        bar.update()
        if step == total_steps or (args.eval_interval and step % args.eval_interval == 0):
            log(engine, file, evaluate(engine, eval_pairs, pad_id))
        if args.save_interval and step % args.save_interval == 0:
            save_checkpoint(engine, folder / "checkpoints", settings, file)
    bar.close()
    save_critic_model(engine, tokenizer, folder)
    print(f"critic saved: load it with create_critic_model('{folder}', ..., rlhf_training=True)")


if __name__ == "__main__":
    main()
    dist.barrier()  # else a gloo thread that frees a tensor after Python's end aborts the process
    dist.destroy_process_group()
