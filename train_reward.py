# SPDX-License-Identifier: MIT
"""Step 2 of RLHF: train a reward model on preference pairs with DeepSpeed and critic.py.

Without arguments a small critic learns, offline, to prefer Python's manual to Title Case.
"""

import argparse
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
from collections import defaultdict
from hashlib import file_digest, sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaModel, logging

from critic import create_critic_model, on_rank_0, save_critic_model


class Pair(NamedTuple):
    prompt: bytes  # a hash
    chosen: array  # token ids
    rejected: array
    tokens: int  # of both, the common prefix once: what the pair costs


def parse_args():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model_name_or_path", help="decoder or reward model, folder or hub id (omit for a demo)")
    add("--data_path", nargs="+", help="pairs: .jsonl or .jsonl.gz files (omit for a demo)")
    add("--eval_path", nargs="+", help="held-out pairs (else those of 10%% of the prompts)")
    add("--max_seq_len", type=int, default=512, help="tokens; pairs with a longer text are dropped")
    add("--num_train_epochs", type=int, default=1, help="passes over the data (0: only evaluate)")
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
    if bool(args.model_name_or_path) != bool(args.data_path):
        parser.error("give --model_name_or_path and --data_path")
    return args


def fail(problem):
    """Exit with one line. Every rank calls it."""
    sys.exit(f"train_reward.py: error: {' '.join(str(problem).split())}")


def start_ranks():
    if "RANK" not in os.environ:  # also under srun, whose tasks would not know of each other
        fail("no launcher: run deepspeed train_reward.py, or torchrun train_reward.py")
    deepspeed.init_distributed()
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, only rank 0 prints
    logging.set_verbosity_error()  # else transformers warns that the head is newly initialised
    torch.backends.cuda.enable_cudnn_sdp(False)  # also where activations are recomputed


def progress(items, **options):
    return tqdm(items, disable=dist.get_rank() > 0, mininterval=5, delay=2, **options)


def load_model(args, ds_config):
    path = args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token is None:
        raise ValueError(f"{path}: the tokenizer has no EOS token, which ends every text: set it")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    torch.manual_seed(args.seed)  # for a newly initialised head
    options = {name: getattr(args, name) for name in ("dropout", "compute_fp32_loss", "loss_on")}
    model = create_critic_model(path, tokenizer, ds_config, **options)
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    if args.max_seq_len > limit:
        raise ValueError(f"--max_seq_len is {args.max_seq_len}, but {path} has {limit} positions")
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenizer


FORMS = """pass "chosen" and "rejected", or "ranked", with or without "prompt": all texts, or all
lists of {"role", "content"} messages"""


def is_response(value):
    """Whether it is a text or messages, whose content the chat template checks."""
    if isinstance(value, list) and value:
        return all(isinstance(message, dict) and "role" in message for message in value)
    return isinstance(value, str) and value.strip() != ""


def encode_row(row, tokenizer):
    """Returns the prompt, given or found, and token ids with EOS, best response first."""
    prompt = row.get("prompt")
    responses = row.get("ranked") or [row.get("chosen"), row.get("rejected")]
    parts = [prompt, *responses] if prompt else responses
    kinds = {type(part) for part in parts}
    is_good = isinstance(responses, list) and len(kinds) == 1 and all(map(is_response, parts))
    if not is_good or len(responses) < 2:
        raise ValueError(FORMS)
    complete = responses
    if prompt:
        if responses[0][: len(prompt)] == prompt:
            raise ValueError("chosen begins with the prompt, which would be there twice: delete it")
        complete = [prompt + response for response in responses]
    texts = complete
    is_text = kinds == {str}
    if is_text:
        common = os.path.commonprefix(texts)
        found = prompt or common.rpartition("\n")[0] or common
    else:
        found = str(prompt or complete[0][:-1] or "")
        options = {"tools": row.get("tools"), "tokenize": False}
        texts = [tokenizer.apply_chat_template(messages, **options) for messages in complete]
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=is_text)["input_ids"]  # a template writes BOS
        has_eos = ids[-1:] == [tokenizer.eos_token_id]
        if not has_eos and not text.rstrip().endswith(tokenizer.eos_token):
            ids.append(tokenizer.eos_token_id)
        rows.append(array("i", ids))
    return found, rows


def read_rows(paths, tokenizer):
    """Yield `encode_row` of all lines of .jsonl[.gz] files. Errors name file and line."""
    for path in paths:
        opener = gzip.open if path.endswith(".gz") else open
        number = 0
        try:
            with opener(path, "rb") as lines:
                for number, line in enumerate(progress(lines, desc=path), 1):
                    if line.strip():
                        yield encode_row(dict(json.loads(line)), tokenizer)
        except (OSError, EOFError, ValueError, TypeError, RecursionError, TemplateError) as error:
            raise ValueError(f"{path}:{number}: {str(error)[:150]}") from error


def read_pairs(paths, tokenizer, max_seq_len):
    """Read all pairs. Long texts are dropped, since truncation would cut their responses."""
    pairs = []
    dropped = 0
    without_prompt = 0
    for found, rows in read_rows(paths, tokenizer):
        prompt = sha256(found.strip().encode() or rows[0]).digest()
        without_prompt += not found.strip()
        for chosen, rejected in itertools.combinations(rows, 2):
            if chosen == rejected or max(len(chosen), len(rejected)) > max_seq_len:
                dropped += 1
                continue
            shared = len(os.path.commonprefix([chosen.tolist(), rejected.tolist()]))
            pairs.append(Pair(prompt, chosen, rejected, len(chosen) + len(rejected) - shared))
    counts = f"{len(pairs)} pairs; dropped {dropped} that are identical or longer than"
    counts += f" {max_seq_len} tokens; {without_prompt} rows have no prompt or common prefix"
    print(f"{paths}: {counts}", flush=True)
    if pairs:
        return pairs
    raise ValueError(f"{paths}: no pairs remain: pass more, or raise --max_seq_len")


def read_data(args, tokenizer):
    """The pairs to train on, and the held-out ones: --eval_path's, or a tenth of the prompts."""
    pairs = read_pairs(args.data_path, tokenizer, args.max_seq_len)
    if args.eval_path:
        return pairs, read_pairs(args.eval_path, tokenizer, args.max_seq_len)
    held_out = set(sorted({pair.prompt for pair in pairs})[::10])
    eval_pairs = [pair for pair in pairs if pair.prompt in held_out]
    return [pair for pair in pairs if pair.prompt not in held_out], eval_pairs


def by_prompt(pairs):
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.prompt].append(pair)
    return list(groups.values())


def deal(pairs, ranks):
    """Give ranks equally many pairs and similar token counts; prompts are split only to fit."""
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


def batches_of_rank(pairs, engine, args, pad_id):
    """For each step that is left, yield this rank's micro-batches."""
    pairs_per_step = engine.train_batch_size()
    micro_batch = engine.train_micro_batch_size_per_gpu()
    skip = engine.global_steps
    prompts = by_prompt(pairs)
    for epoch in range(args.num_train_epochs):
        # The pairs of a prompt stay together, to overfit less (InstructGPT, section 3.5).
        shuffled = itertools.chain(*random.Random(args.seed + epoch).sample(prompts, len(prompts)))
        for _ in range(len(pairs) // pairs_per_step):
            step_pairs = list(itertools.islice(shuffled, pairs_per_step))
            if skip > 0:
                skip -= 1
                continue
            dealt = deal(step_pairs, dist.get_world_size())
            mine = dealt[dist.get_rank()]
            starts = range(0, len(mine), micro_batch)
            yield [collate(mine[at : at + micro_batch], pad_id) for at in starts]


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
    LlamaModel(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained(folder)
    (folder / "manual.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def make_engine(model, ds_config, pairs, args):
    pairs_per_step = DeepSpeedConfig(ds_config).train_batch_size
    epoch_steps = len(pairs) // pairs_per_step  # the remaining pairs are others in each epoch
    if args.num_train_epochs and not epoch_steps:
        raise ValueError(f"{len(pairs)} training pairs give no step of {pairs_per_step}: pass more")
    schedule = ds_config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = args.num_train_epochs * epoch_steps
    return deepspeed.initialize(model=model, config=ds_config)[0], epoch_steps


def newest_checkpoint(folder):
    return max(folder.glob("checkpoints/step-*"), default=None)


def check_output_dir(folder, resume):
    """Raise ValueError if the folder holds a run, unless --resume can continue or restart it."""
    found = [name for name in ("config.json", "metrics.jsonl") if (folder / name).exists()]
    if found and not (resume and (newest_checkpoint(folder) or found == ["metrics.jsonl"])):
        fix = "pass another --output_dir, or --resume a run with checkpoints"
        raise ValueError(f"{folder} holds {found[0]}: {fix}")


def fingerprint(args, ds_config):
    """What a resumed run must have in common with the interrupted one."""
    settings = {"deepspeed_config": ds_config, "number of ranks": dist.get_world_size()}
    names = "model_name_or_path seed num_train_epochs dropout loss_on max_seq_len compute_fp32_loss"
    for name in names.split():
        settings[name] = getattr(args, name)
    settings["data"] = []
    for path in args.data_path + (args.eval_path or []):
        with open(path, "rb") as file:
            settings["data"].append(file_digest(file, "sha256").hexdigest())
    return settings


def resume_run(engine, folder, settings):
    """Load the newest checkpoint and cut metrics.jsonl to its lines; without one, delete it."""
    newest = on_rank_0(newest_checkpoint, folder)
    if newest is None:
        on_rank_0(Path.unlink, folder / "metrics.jsonl", True)  # of a run without checkpoints
        return
    print(f"resuming from {newest}; if it cannot be read, delete it", flush=True)
    before, written = json.loads((newest / "run.json").read_text())
    changed = [name for name in settings if settings[name] != before[name]]
    if changed:
        raise ValueError(f"--resume: {changed} changed since {newest}: undo that, or start over")
    engine.load_checkpoint(str(newest.parent), newest.name)
    on_rank_0(os.truncate, folder / "metrics.jsonl", written)


def save_checkpoint(engine, folder, settings):
    """Write a checkpoint, rename it once it is complete, and delete all but the newest two."""
    unfinished = folder / "checkpoints" / "unfinished"
    engine.save_checkpoint(str(unfinished.parent), unfinished.name, save_latest=False)
    on_rank_0(finish_checkpoint, unfinished, engine.global_steps, settings)


def finish_checkpoint(unfinished, step, settings):
    written = (unfinished.parent.parent / "metrics.jsonl").stat().st_size
    (unfinished / "run.json").write_text(json.dumps([settings, written]))
    os.replace(unfinished, unfinished.parent / f"step-{step:09d}")
    for old in sorted(unfinished.parent.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def log(engine, folder, metrics):
    step = engine.global_steps
    if dist.get_rank() == 0:
        with open(folder / "metrics.jsonl", "a") as file:
            print(json.dumps({"step": step} | metrics), file=file)
    events = [(f"Train/{name}", x, step) for name, x in metrics.items() if x is not None]
    engine.monitor.write_events(events)
    if "eval_loss" in metrics:
        print(f"\nstep {step}: {metrics}", flush=True)


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
    names = "eval_loss eval_accuracy eval_margin eval_chosen_score eval_rejected_score"
    return dict(zip(names.split(), means))


def run_batches(engine, batches, seed):
    """Forward and backward of a step. Returns sums of loss, accuracy and margin: (3,)."""
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    torch.manual_seed(seed)  # dropout: a resumed run draws the same
    for number, batch in enumerate(batches):
        output = engine(**batch)
        engine.backward(output["loss"])
        if number + 1 < len(batches):
            engine.step()  # counts the micro-batch; the optimizer steps after the last one
        sums += pair_metrics(output)[:3].sum(1)
    return sums


def check_finite(value, what, folder):
    """Stop unless a value that all ranks share is finite."""
    if not math.isfinite(value):
        newest = on_rank_0(newest_checkpoint, folder) or "none, see --save_interval"
        fix = f"check the data, or lower the learning rate; last checkpoint: {newest}"
        fail(f"{what} is not finite: {fix}")


def gradient_norm(engine):
    """Of the last step. None: not given, or fp16 seeks its scale. NaN: the step was skipped."""
    if engine.was_step_applied():
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        return None
    return math.nan


def main():
    args = parse_args()
    start_ranks()
    folder = Path(args.output_dir)
    try:
        ds_config = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
        on_rank_0(check_output_dir, folder, args.resume)
        if args.model_name_or_path is None:
            args.model_name_or_path = f"{folder}/demo"
            args.data_path = [f"{folder}/demo/manual.jsonl"]
            on_rank_0(demonstration, folder / "demo")
        model, tokenizer = load_model(args, ds_config)
        train_pairs, eval_pairs = read_data(args, tokenizer)
        engine, epoch_steps = make_engine(model, ds_config, train_pairs, args)
        settings = fingerprint(args, ds_config)
        folder.mkdir(parents=True, exist_ok=True)
        resume_run(engine, folder, settings)
    except (OSError, ValueError) as error:  # bad input; anything else keeps its traceback
        fail(error)
    pad_id = tokenizer.pad_token_id
    pairs_per_step = engine.train_batch_size()
    total_steps = args.num_train_epochs * epoch_steps
    if engine.global_steps == 0:
        log(engine, folder, evaluate(engine, eval_pairs, pad_id, folder))
    if total_steps < 1:
        return
    batches = batches_of_rank(train_pairs, engine, args, pad_id)
    batch = next(batches, None)
    steps = range(engine.global_steps + 1, total_steps + 1)
    bar = progress(steps, initial=engine.global_steps, total=total_steps, desc="training")
    for step in bar:
        began = time.perf_counter()
        seed = args.seed + step * dist.get_world_size() + dist.get_rank()
        sums = run_batches(engine, batch, seed)
        batch = next(batches, None)  # dealt and collated while the device still works
        dist.all_reduce(sums)
        loss, accuracy, margin = (sums / pairs_per_step).tolist()  # the one sync before the step
        check_finite(loss, f"step {step}: the loss", folder)
        engine.step()
        norm = gradient_norm(engine)
        check_finite(norm or 0.0, f"step {step}: the gradient", folder)
        metrics = {"epoch": step / epoch_steps, "loss": loss, "accuracy": accuracy}
        metrics |= {"margin": margin, "grad_norm": norm, "learning_rate": engine.get_lr()[0]}
        metrics["pairs_per_second"] = pairs_per_step / (time.perf_counter() - began)
        log(engine, folder, metrics)
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}", refresh=False)
        if step == total_steps or (args.eval_interval and step % args.eval_interval == 0):
            log(engine, folder, evaluate(engine, eval_pairs, pad_id, folder))
        if args.save_interval and step % args.save_interval == 0:
            save_checkpoint(engine, folder, settings)
    save_critic_model(engine, tokenizer, folder)
    print(f"critic saved: load it with create_critic_model('{folder}', ..., rlhf_training=True)")


if __name__ == "__main__":
    main()
    dist.barrier()  # else a gloo thread that frees a tensor after Python's end aborts the process
    dist.destroy_process_group()
