# SPDX-License-Identifier: MIT
"""Step 2 of RLHF: train a reward model on preference pairs with DeepSpeed and critic.py.

Without arguments a small critic learns, offline, to prefer Python's manual to Title Case.
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
import zlib
from array import array
from collections import defaultdict
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
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaModel, logging

from critic import create_critic_model, on_rank_0, save_critic_model

# ---- Flags, config and model ----


def parse_args():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model_name_or_path", help="decoder or reward model, folder or hub id (omit for a demo)")
    add("--data_path", nargs="+", help="pairs: .jsonl or .jsonl.gz files (omit to only evaluate)")
    add("--eval_path", nargs="+", help="held-out pairs (else those of 10%% of the prompts)")
    add("--max_seq_len", type=int, default=512, help="tokens; pairs with a longer text are dropped")
    add("--num_train_epochs", type=int, default=1, help="passes over the data")
    add("--learning_rate", type=float, help="overrides the optimizer's in --deepspeed_config")
    add("--output_dir", default="output", help="where critic, metrics.jsonl and checkpoints go")
    add("--seed", type=int, default=1234, help="for the value head, the order of the data, dropout")
    add("--dropout", type=float, help="overrides every dropout probability of the model")
    add("--compute_fp32_loss", action=argparse.BooleanOptionalAction, default=True)
    add("--loss_on", choices=["tokens", "end"], default="tokens", help="every token, or the last")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--eval_interval", type=int, default=0, help="steps between evaluations (0: start and end)")
    add("--save_interval", type=int, default=0, help="steps between checkpoints (0: none)")
    add("--resume", action="store_true", help="from the newest checkpoint in --output_dir, if any")
    add("--deepspeed_config", default=str(Path(__file__).with_name("ds_config.json")))
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    args.only_evaluates = bool(args.eval_path and not args.data_path)
    args.is_demonstration = not (args.data_path or args.eval_path)
    if bool(args.model_name_or_path) == args.is_demonstration:
        modes = "--data_path, to train, or --eval_path, to evaluate"
        parser.error(f"give --model_name_or_path together with {modes}")
    if args.num_train_epochs < 1:
        parser.error("--num_train_epochs must be at least 1; to evaluate, omit --data_path")
    if args.only_evaluates and args.resume:
        parser.error("--resume continues training: give --data_path")
    return args


def fail(problem):
    """Exit with one line. Every rank calls it."""
    sys.exit(f"train_reward.py: error: {' '.join(str(problem).split())}")


def is_rank_0():
    """It also works without a process group, as in a notebook that reads data."""
    return os.environ.get("RANK", "0") == "0"


def say(text):
    if is_rank_0():
        print(text, flush=True)


def progress(items=None, **options):
    return tqdm(items, disable=not is_rank_0(), mininterval=5, delay=2, **options)


def start_ranks():
    if "RANK" not in os.environ:
        for tasks in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
            if int(os.environ.get(tasks, "1")) > 1:  # they would not know of each other
                fail(f"several tasks ({tasks}) without RANK: run srun torchrun train_reward.py")
        # One process, so that a debugger works. Port 0 is any free one.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed.init_distributed()
    logging.set_verbosity_error()  # else transformers warns that the head is newly initialised


def auto_keys(config):
    """The keys with value "auto", which transformers' Trainer fills in and DeepSpeed does not."""
    found = []
    for key, value in config.items():
        if value == "auto":
            found.append(key)
        elif isinstance(value, dict) and key != "zero_optimization":  # there, auto is the default
            found += [f"{key}.{inner}" for inner in auto_keys(value)]
    return found


def read_config(args):
    """DeepSpeed's config, checked before anything is loaded."""
    path = args.deepspeed_config
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if args.only_evaluates:
            remove_optimizer(config)
        elif "type" not in config.get("optimizer", {}):
            raise ValueError('"optimizer" is missing, or its "type": add it, as in ds_config.json')
        if args.learning_rate is not None and not args.only_evaluates:
            set_learning_rate(config, args.learning_rate)
        unresolved = set(auto_keys(config)) - {"scheduler.params.total_num_steps"}
        if unresolved:
            raise ValueError(f'"auto" at {sorted(unresolved)}: write a value')
        DeepSpeedConfig(config)  # among others, checks the batch sizes
    except (OSError, AssertionError, DeepSpeedConfigError, ValueError) as error:
        raise ValueError(f"--deepspeed_config {path}: {error}") from error
    return config


def remove_optimizer(config):
    """An evaluation needs no optimizer. Without one, ZeRO 1 and 2 are errors."""
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    if config.get("zero_optimization", {}).get("stage") != 3:
        config.pop("zero_optimization", None)


def set_learning_rate(config, learning_rate):
    schedule = config.get("scheduler", {}).get("type")
    if schedule not in (None, "WarmupCosineLR"):
        raise ValueError(f"--learning_rate: {schedule} sets its own: change its params instead")
    config["optimizer"].setdefault("params", {})["lr"] = learning_rate


def load_model(args, ds_config):
    path = args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:  # for a wrong path, it does not name the path
        raise ValueError(f"--model_name_or_path {path}: no tokenizer: {error}") from error
    if tokenizer.eos_token is None:
        raise ValueError(f"{path}: the tokenizer has no EOS token, which ends every text: set it")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # A trained model has no embedding for a new token, and needs none to be evaluated.
        pad_token = tokenizer.eos_token if args.only_evaluates else "[PAD]"
        tokenizer.add_special_tokens({"pad_token": pad_token})
    torch.manual_seed(args.seed)  # for a newly initialised head
    options = {name: getattr(args, name) for name in ("dropout", "compute_fp32_loss", "loss_on")}
    options["rlhf_training"] = args.only_evaluates  # requires a head
    model = create_critic_model(path, tokenizer, ds_config, **options)
    say(f"{path}: {model.load_report}")
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    if args.max_seq_len > limit:
        raise ValueError(f"--max_seq_len is {args.max_seq_len}, but {path} has {limit} positions")
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenizer


# ---- Data: rows, texts, token ids, pairs ----

FORMS = """pass "chosen" and "rejected", or "ranked", with or without "prompt": all texts, or all
lists of {"role", "content"} messages"""
# What stands between the prompt and the response of a complete text: of HH-RLHF and others.
RESPONSE_TAGS = ("\n\nAssistant:", "\nAssistant:", "\nA:", "<|assistant|>", "<|im_start|>assistant")
RESPONSE_TAGS += ("<start_of_turn>model", "### Response:", "[/INST]")


class Row(NamedTuple):
    """A line of a data file."""

    prompt: str  # rows with equal values share a prompt; "" if none is given or found
    texts: list[str]  # prompt and response, best response first
    is_plain: bool  # EOS is appended; else a chat template rendered it
    add_special_tokens: bool  # for plain texts that do not begin with BOS already
    repeats_prompt: bool  # a response begins with the prompt


class Pair(NamedTuple):
    prompt: bytes  # a hash
    chosen: array  # token ids
    rejected: array
    tokens: int  # of both, the common prefix once: what the pair costs


def drop_nulls(values):
    """null counts as absent: datasets' to_json writes null for every key that a row lacks."""
    return {key: value for key, value in values.items() if value is not None}


def is_response(value):
    """Whether it is a text or messages, whose content the chat template checks."""
    if isinstance(value, list) and value:
        return all(isinstance(message, dict) and "role" in message for message in value)
    return isinstance(value, str) and value.strip() != ""


def prompt_of_texts(prompt, texts):
    """The given prompt, else what all texts begin with, up to the tag of the response."""
    if prompt:
        prompt = prompt.rstrip()
        for tag in RESPONSE_TAGS:
            prompt = prompt.removesuffix(tag)
        return prompt.strip()
    common = os.path.commonprefix(texts)
    end = max(common.rfind(tag) for tag in RESPONSE_TAGS)
    if end < 0:
        # Lines that both texts begin with: "Q\nYes" and "Q\nYet" have the prompt "Q". Without a
        # tag, a first line that both responses share is taken for a part of the prompt.
        end = common.rfind("\n")
    return (common[: max(end, 0)] or common).strip()


def prompt_of_messages(prompt, dialogues):
    """The messages, given or those that all dialogues begin with, up to the user's last one.

    So tool calls, and first turns that all responses share, do not make another prompt of it.
    """
    turns = [[json.dumps(turn, sort_keys=True) for turn in dialogue] for dialogue in dialogues]
    count = len(prompt or os.path.commonprefix(turns))
    users = [at for at, turn in enumerate(dialogues[0][:count]) if turn["role"] == "user"]
    end = users[-1] + 1 if users else count
    return "".join(turns[0][:end])


def encode_row(row, tokenizer):
    """A Row of the JSON object of a line, which must have one of the FORMS."""
    if not isinstance(row, dict):
        raise TypeError(FORMS)
    prompt = row.get("prompt")
    responses = row.get("ranked") or [row.get("chosen"), row.get("rejected")]
    parts = [prompt, *responses] if prompt else responses
    kinds = {type(part) for part in parts}
    is_good = isinstance(responses, list) and len(kinds) == 1 and all(map(is_response, parts))
    if not is_good or len(responses) < 2:
        raise ValueError(FORMS)
    complete = responses
    repeats_prompt = False
    if prompt:
        complete = [prompt + response for response in responses]
        repeats_prompt = any(response[: len(prompt)] == prompt for response in responses)
    if kinds == {str}:
        "".join(complete).encode()  # an error for half of a surrogate pair
        bos = tokenizer.bos_token
        has_bos = bos is not None and all(text.startswith(bos) for text in complete)
        return Row(
            prompt=prompt_of_texts(prompt, complete),
            texts=complete,
            is_plain=True,
            add_special_tokens=not has_bos,
            repeats_prompt=repeats_prompt,
        )
    tools = row.get("tools")
    if isinstance(tools, str):  # as many hub datasets store them
        tools = json.loads(tools, object_hook=drop_nulls)
    texts = []
    for messages in complete:
        texts.append(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    return Row(
        prompt=prompt_of_messages(prompt, complete),
        texts=texts,
        is_plain=False,
        add_special_tokens=False,
        repeats_prompt=repeats_prompt,
    )


def read_rows(paths, tokenizer):
    """Yield a Row for each line of .jsonl[.gz] files. Errors name file and line."""
    bad = (OSError, EOFError, zlib.error, ValueError, TypeError, RecursionError, TemplateError)
    for path in paths:
        opener = gzip.open if str(path).endswith(".gz") else open
        number = 0
        try:
            with opener(path, "rb") as lines:
                for number, line in enumerate(progress(lines, desc=path), 1):
                    if line.strip():
                        row = json.loads(line, object_hook=drop_nulls)
                        yield encode_row(row, tokenizer)
        except bad as error:
            raise ValueError(f"{path}:{number}: {str(error)[:150]}") from error


def tokenize(rows, tokenizer):
    """Yield each row with the token ids of its texts, best response first.

    Messages become what the template renders, since pipelines, TRL and vLLM score that. A plain
    text gets the tokenizer's special tokens, unless it begins with BOS already, and EOS, once.
    """
    eos = tokenizer.eos_token_id
    for special, group in itertools.groupby(rows, key=lambda row: row.add_special_tokens):
        while batch := list(itertools.islice(group, 1000)):  # in one call, it uses its threads
            texts = list(itertools.chain.from_iterable(row.texts for row in batch))
            options = {"add_special_tokens": special, "return_attention_mask": False}
            encoded = iter(tokenizer(texts, **options)["input_ids"])
            for row in batch:
                ids_of_row = list(itertools.islice(encoded, len(row.texts)))
                if row.is_plain:
                    ids_of_row = [end_with(ids, eos) for ids in ids_of_row]
                yield row, [array("i", ids) for ids in ids_of_row]


def end_with(ids, eos):
    """Make the ids end with exactly one EOS, which the text or the tokenizer may have added."""
    while ids[-1:] == [eos]:
        ids = ids[:-1]
    return [*ids, eos]


def read_pairs(paths, tokenizer, max_seq_len):
    """Read all pairs. Long texts are dropped, since truncation would cut their responses."""
    pairs = []
    dropped = 0
    without_prompt = 0
    repeat_prompt = 0
    for row, texts in tokenize(read_rows(paths, tokenizer), tokenizer):
        prompt = sha256((row.prompt or row.texts[0]).encode()).digest()
        without_prompt += not row.prompt
        repeat_prompt += row.repeats_prompt
        for chosen, rejected in itertools.combinations(texts, 2):
            if chosen == rejected or max(len(chosen), len(rejected)) > max_seq_len:
                dropped += 1
                continue
            shared = len(os.path.commonprefix([chosen.tolist(), rejected.tolist()]))
            pairs.append(Pair(prompt, chosen, rejected, len(chosen) + len(rejected) - shared))
    counts = f"{len(pairs)} pairs; dropped {dropped} that are identical or longer than"
    counts += f" {max_seq_len} tokens; {without_prompt} rows have no prompt or common prefix,"
    say(f"{paths}: {counts} {repeat_prompt} have a response that begins with the prompt")
    if pairs:
        return pairs
    raise ValueError(f"{paths}: no pairs remain: pass more, or raise --max_seq_len")


def read_data(args, tokenizer):
    """The pairs to train on, and the held-out ones: --eval_path's, or a tenth of the prompts."""
    pairs = []
    if args.data_path:
        pairs = read_pairs(args.data_path, tokenizer, args.max_seq_len)
    if args.eval_path:
        return pairs, read_pairs(args.eval_path, tokenizer, args.max_seq_len)
    # Prompts are hashes, whose order says nothing about the prompt: every tenth is a random one.
    held_out = set(sorted({pair.prompt for pair in pairs})[::10])
    eval_pairs = [pair for pair in pairs if pair.prompt in held_out]
    return [pair for pair in pairs if pair.prompt not in held_out], eval_pairs


def demonstration(folder):
    """Write a small Llama on bytes, and pairs: passages of Python's manual, and in Title Case."""
    rows = []
    for topic in topics.values():
        text = " ".join(topic.split())
        for at in range(0, len(text) - 120, 300):
            response = text[at + 40 : at + 120]
            texts = {"chosen": response, "rejected": response.title()}
            rows.append({"prompt": text[at : at + 40]} | texts)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": len(tokenizer) + 5}
    torch.manual_seed(1)  # the same base model for every --seed
    LlamaModel(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained(folder)
    (folder / "manual.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


# ---- Batches ----


def by_prompt(pairs):
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.prompt].append(pair)
    return list(groups.values())


def shuffle_prompts(pairs, seed):
    """The pairs of a prompt stay together, to overfit less (InstructGPT, section 3.5)."""
    prompts = by_prompt(pairs)
    return list(itertools.chain(*random.Random(seed).sample(prompts, len(prompts))))


def deal(pairs, ranks):
    """Give ranks equally many pairs and similar token counts.

    Prompts with many tokens come first. Each goes to the rank with the fewest tokens among those
    that have room for all its pairs. If none has, it is split.
    """
    size = len(pairs) // ranks
    dealt = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for group in sorted(by_prompt(pairs), key=lambda group: -sum(pair.tokens for pair in group)):
        while group:
            room = [size - len(part) for part in dealt]
            free = [rank for rank in range(ranks) if room[rank]]
            rank = min(free, key=lambda rank: (room[rank] < len(group), loads[rank]))
            part = group[: room[rank]]
            group = group[room[rank] :]
            dealt[rank] += part
            loads[rank] += sum(pair.tokens for pair in part)
    return dealt


def collate(pairs, pad_id):
    """(2B, T) each, on the CPU, where the model removes padding before it sends the rest."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids = [torch.frombuffer(row, dtype=torch.int32) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": input_ids, "attention_mask": mask}


def batches_of_rank(pairs, engine, pad_id):
    """Yield this rank's micro-batches of the pairs of a step."""
    micro_batch = engine.train_micro_batch_size_per_gpu()
    mine = deal(pairs, dist.get_world_size())[dist.get_rank()]
    for at in range(0, len(mine), micro_batch):
        yield collate(mine[at : at + micro_batch], pad_id)


# ---- Engine, checkpoints and resume ----

RUN_FILES = ("demo", "config.json", "metrics.jsonl", "checkpoints")
SETTINGS = ("model_name_or_path", "seed", "num_train_epochs", "dropout", "loss_on", "max_seq_len")
SETTINGS += ("compute_fp32_loss",)


def make_engine(model, ds_config, pairs, args):
    pairs_per_step = DeepSpeedConfig(ds_config).train_batch_size
    epoch_steps = len(pairs) // pairs_per_step  # each epoch leaves out other pairs
    if not epoch_steps and not args.only_evaluates:
        raise ValueError(f"{len(pairs)} training pairs give no step of {pairs_per_step}: pass more")
    schedule = ds_config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = args.num_train_epochs * epoch_steps
    try:
        return deepspeed.initialize(model=model, config=ds_config)[0]
    except AssertionError as error:  # DeepSpeed's for an optimizer that it does not know, ...
        raise ValueError(f"--deepspeed_config {args.deepspeed_config}: {error}") from error


def newest_checkpoint(folder):
    return max(folder.glob("checkpoints/step-*"), default=None)


def check_output_dir(folder, args):
    """Raise ValueError if the folder holds a run, unless this one resumes or replaces it.

    A demonstration replaces an earlier one. --resume continues a run from its newest checkpoint,
    or restarts a run that ended before its first. Nothing else may write into the folder.
    """
    found = []
    for name in RUN_FILES:
        path = folder / name
        if path.exists() and path.stat().st_size > 0:  # before the first line, metrics are empty
            found.append(name)
    replaces = args.is_demonstration and "demo" in found
    can_resume = not (args.is_demonstration or args.only_evaluates or "demo" in found)
    is_unfinished = "config.json" not in found
    can_resume = can_resume and (is_unfinished or newest_checkpoint(folder) is not None)
    if found and not replaces and not (args.resume and can_resume):
        fix = "pass another --output_dir" + (", or --resume" if can_resume else "")
        raise ValueError(f"{folder} holds {found[0]}: {fix}")


def open_metrics(folder, args):
    """Open metrics.jsonl, locked while the run lives. Only rank 0 writes into it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl" if is_rank_0() else os.devnull
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    on_rank_0(lock_metrics, file, folder, args)
    return file


def lock_metrics(file, folder, args):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        fix = "end it, or pass another --output_dir"
        raise ValueError(f"{file.name}: another run writes there: {fix} ({error})") from error
    if args.is_demonstration and not args.resume:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    check_output_dir(folder, args)  # again: another run may have ended since


def fingerprint(args, ds_config):
    """What a resumed run must have in common with the interrupted one."""
    settings = {"deepspeed_config": ds_config, "number of ranks": dist.get_world_size()}
    for name in SETTINGS:
        settings[name] = getattr(args, name)
    for name in ("data_path", "eval_path"):
        settings[name] = []
        for path in getattr(args, name) or []:
            with open(path, "rb") as file:
                settings[name].append(file_digest(file, "sha256").hexdigest())
    return settings


def resume_run(engine, folder, file, settings, resume):
    """Load the newest checkpoint, if there is one, and cut metrics.jsonl to its lines."""
    newest = on_rank_0(newest_checkpoint, folder)
    written = 0
    if resume and newest is None:
        say(f"{folder} has no checkpoint: starting at step 0")
    if newest is not None:
        say(f"resuming from {newest}; if it cannot be read, delete it")
        before, written = json.loads((newest / "run.json").read_text())
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            raise ValueError(
                f"--resume: {changed} changed since {newest}: undo that, or start over"
            )
        engine.load_checkpoint(str(newest.parent), newest.name)
    on_rank_0(file.truncate, min(written, file.tell()))  # it is shorter if a user deleted it


def save_checkpoint(engine, folder, file, settings):
    """Write a checkpoint, rename it once it is complete, and delete all but the newest two."""
    unfinished = folder / "checkpoints" / "unfinished"
    engine.save_checkpoint(str(unfinished.parent), unfinished.name, save_latest=False)
    on_rank_0(finish_checkpoint, unfinished, engine.global_steps, [settings, file.tell()])


def finish_checkpoint(unfinished, step, run):
    (unfinished / "run.json").write_text(json.dumps(run))
    os.replace(unfinished, unfinished.parent / f"step-{step:09d}")
    for old in sorted(unfinished.parent.glob("step-*"))[:-2]:
        shutil.rmtree(old)


# ---- Metrics ----

EVAL_METRICS = ("eval_loss", "eval_accuracy", "eval_margin", "eval_chosen_score")
EVAL_METRICS += ("eval_rejected_score",)


def log(engine, file, metrics):
    step = engine.global_steps
    print(json.dumps({"step": step} | metrics), file=file, flush=True)
    events = [(f"Train/{name}", x, step) for name, x in metrics.items() if x is not None]
    engine.monitor.write_events(events)
    if "eval_loss" in metrics:
        rounded = {name: round(x, 4) for name, x in metrics.items()}
        say(f"\nstep {step}: {rounded}")


def pair_metrics(output):
    """Loss, accuracy (0.5 for a tie), margin and both scores per pair: (5, B), on the device."""
    loss, chosen, rejected = (value.detach().double() for value in output.values())
    margin = chosen - rejected
    accuracy = (margin.sign() + 1) / 2
    return torch.stack([loss.expand_as(margin), accuracy, margin, chosen, rejected])


@torch.no_grad()
def evaluate(engine, pairs, pad_id, folder):
    """Means of the metrics, the same on any number of ranks."""
    size = engine.train_micro_batch_size_per_gpu()
    sums = torch.zeros(5, dtype=torch.float64, device=engine.device)
    engine.eval()
    starts = range(0, len(pairs), size * dist.get_world_size())
    for start in progress(starts, desc="evaluating", leave=False):
        first = start + dist.get_rank() * size
        mine = pairs[first : first + size]
        output = engine(**collate(mine or pairs[:1], pad_id))  # under ZeRO-3 no rank may be idle
        sums += pair_metrics(output)[:, : len(mine)].sum(1)
    engine.train()
    dist.all_reduce(sums)
    means = (sums / len(pairs)).tolist()
    check_finite(means[0], f"step {engine.global_steps}: the held-out loss", folder)
    return dict(zip(EVAL_METRICS, means)) | {"eval_pairs": len(pairs)}


def check_finite(value, what, folder):
    """Stop unless a value that all ranks share is finite."""
    if not math.isfinite(value):
        newest = on_rank_0(newest_checkpoint, folder) or "none, see --save_interval"
        fix = f"check the data, or lower the learning rate; last checkpoint: {newest}"
        fail(f"{what} is not finite: {fix}")


def gradient_norm(engine):
    """The norm of the last step's gradient before clipping.

    It is None where DeepSpeed does not give it, and while fp16 seeks its loss scale. It is infinite
    if the step was skipped for another reason.
    """
    if engine.was_step_applied():
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        return None
    return math.inf


# ---- The loop ----


def set_up(args, folder):
    """Everything before the first step. Bad input ends here, before anything is written."""
    ds_config = read_config(args)
    on_rank_0(check_output_dir, folder, args)
    for path in [*(args.data_path or []), *(args.eval_path or [])]:
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
    if args.is_demonstration:
        args.model_name_or_path = f"{folder}/demo"
        args.data_path = [f"{folder}/demo/manual.jsonl"]
        on_rank_0(demonstration, folder / "demo")
    model, tokenizer = load_model(args, ds_config)
    train_pairs, eval_pairs = read_data(args, tokenizer)
    engine = make_engine(model, ds_config, train_pairs, args)
    settings = on_rank_0(fingerprint, args, ds_config)
    file = open_metrics(folder, args)
    resume_run(engine, folder, file, settings, args.resume)
    return engine, tokenizer, train_pairs, eval_pairs, settings, file


def main():
    args = parse_args()
    start_ranks()
    folder = Path(args.output_dir)
    try:
        engine, tokenizer, train_pairs, eval_pairs, settings, file = set_up(args, folder)
    except (OSError, ValueError) as error:  # bad input; anything else keeps its traceback
        fail(error)
    pad_id = tokenizer.pad_token_id
    pairs_per_step = engine.train_batch_size()
    epoch_steps = len(train_pairs) // pairs_per_step
    total_steps = args.num_train_epochs * epoch_steps
    step = engine.global_steps  # 0, or that of the checkpoint
    if step == 0:
        log(engine, file, evaluate(engine, eval_pairs, pad_id, folder))
    if args.only_evaluates:
        return
    bar = progress(initial=step, total=total_steps, desc="training")
    for epoch in range(step // epoch_steps, args.num_train_epochs):
        shuffled = shuffle_prompts(train_pairs, args.seed + epoch)
        for at in range(step % epoch_steps, epoch_steps):
            began = time.perf_counter()
            learning_rate = engine.optimizer.param_groups[0]["lr"]  # WarmupCosineLR begins at 0
            step += 1
            # Dropout depends on seed, step and rank only, so that a resumed run draws the same.
            torch.manual_seed(args.seed + step * dist.get_world_size() + dist.get_rank())
            step_pairs = shuffled[at * pairs_per_step : (at + 1) * pairs_per_step]
            sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
            for batch in batches_of_rank(step_pairs, engine, pad_id):
                output = engine(**batch)
                engine.backward(output["loss"])
                engine.step()  # the optimizer steps after the last micro-batch only
                sums += pair_metrics(output)[:3].sum(1)
            dist.all_reduce(sums)
            loss, accuracy, margin = (sums / pairs_per_step).tolist()
            norm = gradient_norm(engine)
            # Nothing of this step has been saved yet.
            check_finite(loss, f"step {step}: the loss", folder)
            check_finite(norm or 0.0, f"step {step}: the gradient", folder)
            metrics = {"epoch": step / epoch_steps, "loss": loss, "accuracy": accuracy}
            metrics |= {"margin": margin, "grad_norm": norm, "learning_rate": learning_rate}
            metrics["pairs_per_second"] = pairs_per_step / (time.perf_counter() - began)
            log(engine, file, metrics)
            bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}", refresh=False)
            bar.update()
            if step == total_steps or (args.eval_interval and step % args.eval_interval == 0):
                log(engine, file, evaluate(engine, eval_pairs, pad_id, folder))
            if args.save_interval and step % args.save_interval == 0:
                save_checkpoint(engine, folder, file, settings)
    bar.close()
    save_critic_model(engine, tokenizer, folder)
    say(f"critic saved: load it with create_critic_model('{folder}', ..., rlhf_training=True)")


if __name__ == "__main__":
    main()
    dist.barrier()  # else a gloo thread that frees a tensor after Python's end aborts the process
    dist.destroy_process_group()
