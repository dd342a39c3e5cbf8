# SPDX-License-Identifier: MIT
"""Step 2 of RLHF: train a reward model on preference pairs with DeepSpeed. Needs critic.py beside it. Without
arguments a small critic learns, offline, to tell Python's reference manual from a garbled copy."""

import argparse
import contextlib
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
from collections.abc import Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.config import DeepSpeedConfig
from tqdm import tqdm
from transformers import AutoTokenizer, logging

from critic import Tokenizer, create_critic_model, on_rank_0, save_critic_model

SIDES = "chosen", "rejected"  # a pair: {"where": "file:line", "prompt": its hash, token ids for each side}


def parse_args() -> argparse.Namespace:
    formatter, yes_or_no = argparse.ArgumentDefaultsHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", help="pretrained decoder: folder or hub id (omit for the demo)")
    add("--data_path", nargs="+", help="pairs: .jsonl or .jsonl.gz files (omit for the demo)")
    add("--eval_path", nargs="+", help="held-out pairs (else those of 10%% of the prompts)")
    add("--max_seq_len", type=int, default=512, help="tokens; pairs with a longer text are dropped")
    add("--num_train_epochs", type=int, default=1, help="passes over the data")
    add("--output_dir", default="output", help="where critic, metrics.jsonl and checkpoints go")
    add("--seed", type=int, default=1234, help="for the value head, the order of the data and dropout")
    add("--dropout", type=float, help="overrides every dropout probability of the model")
    add("--compute_fp32_loss", action=yes_or_no, default=True, help="value head and loss in float32")
    add("--loss_on", choices=["tokens", "end"], default="tokens", help="every response token, or the last")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--eval_interval", type=int, default=0, help="steps between evaluations (0: only at start and end)")
    add("--save_interval", type=int, default=0, help="steps between checkpoints (0: no checkpoints)")
    add("--eval_only", action="store_true", help="only evaluate a trained reward model on --eval_path")
    add("--resume", action="store_true", help="resume from the newest checkpoint in --output_dir, if any")
    add("--deepspeed_config", default=f"{Path(__file__).parent}/ds_config.json", help="batch, lr, ZeRO, ...")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    has_data = args.eval_path if args.eval_only else args.data_path
    if bool(args.model_name_or_path) != bool(has_data) or (args.eval_only and not has_data):
        parser.error("give --model_name_or_path with --data_path, or with --eval_only and --eval_path")
    return args


def fail(message: str) -> NoReturn:
    sys.exit(f"train_reward.py: error: {message}")


@contextlib.contextmanager
def explain(message: str, width: int = 2000) -> Any:
    """Exit with one line on any exception inside: what is wrong, what to do, and the library's reason."""
    try:
        yield
    except Exception as error:
        fail(f"{message} ({' '.join(str(error).split())[:width]})")


def bar(*args: Any, **options: Any) -> tqdm:
    """A progress bar on rank 0; in a log file it writes twice a minute."""
    pause, hidden = 0.1 if sys.stderr.isatty() else 30, dist.is_initialized() and dist.get_rank() > 0
    return tqdm(*args, disable=hidden, mininterval=pause, maxinterval=max(10, pause), **options)


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", JSON value) for each line of a .jsonl[.gz] file. Messages lose their nulls."""
    drop_nulls = lambda x: {k: v for k, v in x.items() if v is not None} if "role" in x else x
    with explain(f"{path}: cannot be read; pass a .jsonl or .jsonl.gz file", 80):
        lines = (gzip.open if path.endswith(".gz") else open)(path, "rb")
        for number, line in enumerate(bar(lines, desc="tokenizing", unit=" rows", delay=2), 1):
            if line.strip():
                with explain(f"{path}:{number}: not JSON in UTF-8; fix or delete the line", 100):
                    row = json.loads(line, object_hook=drop_nulls)
                    json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate fails here
                yield f"{path}:{number}", row


def check_response(value: Any, where: str, key: str) -> str | list[dict[str, Any]]:
    """A text, or a list of messages, whose content the chat template checks. One message becomes a list."""
    items = value if isinstance(value, str | list) else [value]
    has_role = (isinstance(item, dict) and isinstance(item.get("role"), str) for item in items)
    if not items or not (items.strip() if isinstance(items, str) else all(has_role)):
        found = "missing or null" if value is None else json.dumps(value)[:50]
        fail(f'{where}: "{key}" is {found}; expected a text, or a list of {{"role", "content"}} messages')
    return items


def render(where: str, row: Any, tokenizer: Tokenizer) -> Iterator[tuple[str, str, tuple[str, str], bool]]:
    """Yield where, prompt, (chosen, rejected) texts, and whether they lack BOS, for each pair of a row."""
    row = row if isinstance(row, dict) else {}
    prompt, groups = row.get("prompt") or None, [(side, row.get(side)) for side in SIDES]
    if isinstance(ranked := row.get("ranked"), list) and len(ranked) > 1:  # a level each, best first
        groups = [("ranked", [response]) for response in ranked]
    several = lambda x: isinstance(x, list) and x and isinstance(x[0], str | list)
    levels = [[check_response(x, where, key) for x in (xs if several(xs) else [xs])] for key, xs in groups]
    responses = list(itertools.chain(*levels))
    if isinstance(prompt, str) and isinstance(responses[0], list):  # complete dialogues, as in UltraFeedback
        if not all(isinstance(r, list) and prompt in [m.get("content") for m in r] for r in responses):
            fail(f'{where}: "prompt" is not a message of each response; pass a list of messages')
        prompt = None
    prompt = prompt if isinstance(prompt, str) else prompt and check_response(prompt, where, "prompt")
    if len({type(text) for text in (prompt or responses[0], *responses)}) > 1:
        fail(f"{where}: texts and messages are mixed; expected the prompt and all responses in one form")
    if is_text := isinstance(responses[0], str):
        tag, common = "\n\nAssistant:", os.path.commonprefix(responses)  # the tag is HH-RLHF's
        common = prompt or common.rpartition(tag)[0] or common.rpartition("\n")[0] or common
        common, write = common.strip().removesuffix(tag.strip()).strip(), lambda text: (prompt or "") + text
    else:
        turns = [[json.dumps(m, sort_keys=True) for m in r] for r in ([prompt] if prompt else responses)]
        common, options = "".join(os.path.commonprefix(turns)), {"tools": row.get("tools"), "tokenize": False}
        write = lambda items: tokenizer.apply_chat_template((prompt or []) + items, **options).rstrip()
    with explain(f"{where}: the chat template fails; fix the row, or set a template", 100):
        levels = [[write(response) for response in level] for level in levels]
    for two in itertools.combinations(levels, 2):
        yield from ((where, common, pair, is_text) for pair in itertools.product(*two))


def read_pairs(paths: list[str], tokenizer: Tokenizer, max_seq_len: int) -> list[dict]:
    """Read all pairs; texts end with EOS. Long texts are dropped, since truncation would cut responses."""
    pairs, promptless, dropped, eos = [], [], {"identical": 0, "long": 0}, tokenizer.eos_token_id
    rows = (pair for path in paths for item in read_rows(path) for pair in render(*item, tokenizer))
    while batch := list(itertools.islice(rows, 500)):  # fast tokenizers use threads on a batch
        tokens = {}
        for bos in {adds_bos for *_, adds_bos in batch}:
            texts = list(dict.fromkeys(x for *_, two, adds_bos in batch if adds_bos == bos for x in two))
            lists = tokenizer(texts, add_special_tokens=bos, return_attention_mask=False)["input_ids"]
            for text, ids in zip(texts, lists):
                tokens[text, bos] = array("i", ids if ids[-1:] == [eos] else [*ids, eos])
        for where, prompt, two, bos in batch:
            chosen, rejected = (tokens[text, bos] for text in two)
            if chosen == rejected or max(len(chosen), len(rejected)) > max_seq_len:
                dropped["identical" if chosen == rejected else "long"] += 1
                continue
            promptless += [] if prompt else [where]
            prompt = sha256(prompt.encode()).digest()[:8]
            pairs.append({"where": where, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    counts = f"{dropped['identical']} identical, {dropped['long']} longer than {max_seq_len} tokens"
    print(f"{', '.join(paths)}: {len(pairs)} pairs; dropped: {counts}", flush=True)
    if promptless:
        what = 'have no prompt or common prefix: if another key holds the prompt, rename it to "prompt"'
        print(f"warning: {len(promptless)} pairs, the first in {promptless[0]}, {what}")
    if not pairs:
        fail(f"{', '.join(paths)}: no pairs remain ({counts} dropped); pass more, or a larger --max_seq_len")
    return pairs


def shuffle_prompts(pairs: list[dict], seed: int) -> list[dict]:
    """Shuffle prompts; the pairs of a prompt stay together, to overfit less (InstructGPT, section 3.5)."""
    rng = random.Random(seed)
    draw = {prompt: rng.random() for prompt in dict.fromkeys(pair["prompt"] for pair in pairs)}
    return sorted(pairs, key=lambda pair: draw[pair["prompt"]])


def count_nodes(pairs: list[dict]) -> int:
    """Content tokens of the prefix tree of these pairs: each distinct (prefix, token) once."""
    rows = sorted(pair[side].tolist() for pair in pairs for side in SIDES)
    return sum(map(len, rows)) - sum(len(os.path.commonprefix(two)) for two in itertools.pairwise(rows))


def deal(pairs: list[dict], ranks: int) -> list[list[dict]]:
    """Give each rank as many pairs and similar token counts: large prompts first, to the lightest rank."""
    dealt, loads, size = [[] for _ in range(ranks)], [0] * ranks, len(pairs) // ranks
    groups = [list(group) for _, group in itertools.groupby(pairs, lambda pair: pair["prompt"])]
    for group in sorted(groups, key=count_nodes, reverse=True):
        while group:
            room = [size - len(part) for part in dealt]
            rank = min((r for r in range(ranks) if room[r]), key=lambda r: (room[r] < len(group), loads[r]))
            part, group = group[: room[rank]], group[room[rank] :]
            dealt[rank] += part
            loads[rank] += count_nodes(part)
    return dealt


def collate(pairs: list[dict], tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """(2B, T) each, on the CPU: the model removes padding there and sends the rest to its device."""
    rows = [{"input_ids": pair[side].tolist()} for side in SIDES for pair in pairs]
    return dict(tokenizer.pad(rows, return_tensors="pt"))


def demonstration(folder: Path, seed: int) -> None:
    """Write a small Llama and pairs: passages of Python's manual, and the same with shuffled letters."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    rng, rows = random.Random(seed), []
    for words in (topics[name].split() for name in sorted(topics)):
        for at in range(0, len(words) - 39, 90):
            prompt, response = words[at : at + 12], words[at + 12 : at + 40]
            garbled = ["".join(rng.sample(w, len(w))) if rng.random() < 0.25 else w for w in response]
            rows.append({"chosen": " ".join(prompt + response), "rejected": " ".join(prompt + garbled)})
    bpe, texts = ByteLevelBPETokenizer(), [row["chosen"] for row in rows]
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    LlamaModel(config).save_pretrained(folder)
    (folder / "manual.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def prepare(args: argparse.Namespace) -> tuple:
    """Check all input, read and build. Returns engine, tokenizer, train pairs, held-out pairs, config."""
    if "RANK" not in os.environ:  # `python train_reward.py`, without a launcher; port 0 is any free one
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    logging.set_verbosity_error()  # else transformers warns that the head is newly initialised
    deepspeed.init_distributed(timeout=timedelta(hours=6))  # rank 0 may take hours to write 140 GB
    sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")  # only rank 0 prints
    folder, path, data_path = Path(args.output_dir), args.model_name_or_path, args.data_path
    names = ["config.json"] if args.resume else ["config.json", "metrics.jsonl", "checkpoints"]
    taken = on_rank_0(lambda: [name for name in names if (folder / name).exists()])
    if taken and not args.eval_only and not (args.resume and newest_checkpoint(folder)):
        fail(f"{folder} holds {taken[0]}: pass another --output_dir, or --resume a run with checkpoints")
    with explain(f"--deepspeed_config {args.deepspeed_config}: pass JSON for DeepSpeed, like ds_config.json"):
        ds_config = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
        pairs_per_step, _ = DeepSpeedConfig(ds_config).train_batch_size, ds_config["optimizer"]
    torch.manual_seed(args.seed)
    if path is None:
        path, data_path = str(folder / "demo"), [f"{folder}/demo/manual.jsonl"]
        on_rank_0(lambda: demonstration(folder / "demo", args.seed))
    with explain(f"--model_name_or_path {path}: cannot make a critic of this folder or hub id"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.eos_token is None:
            fail(f"{path}: the tokenizer has no EOS token, with which every text ends; set one and save it")
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # a trained critic cannot grow
            tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token if args.eval_only else "[PAD]"})
        options = {"rlhf_training": args.eval_only, "compute_fp32_loss": args.compute_fp32_loss}
        model = create_critic_model(path, tokenizer, ds_config, dropout=args.dropout, **options)
    if args.max_seq_len > (limit := getattr(model.config, "max_position_embeddings", args.max_seq_len)):
        fail(f"--max_seq_len is {args.max_seq_len}, but {path} has {limit} positions: pass at most that")
    model.train().loss_on = args.loss_on
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    train_pairs = [] if args.eval_only else read_pairs(data_path, tokenizer, args.max_seq_len)
    if args.eval_path:
        eval_pairs = read_pairs(args.eval_path, tokenizer, args.max_seq_len)
    else:  # a tenth of the prompts, by their hash
        held_out = set(sorted({pair["prompt"] for pair in train_pairs})[::10])
        eval_pairs = [pair for pair in train_pairs if pair["prompt"] in held_out]
        train_pairs = [pair for pair in train_pairs if pair["prompt"] not in held_out]
    steps = args.num_train_epochs * (len(train_pairs) // pairs_per_step)
    if steps < 1 and not args.eval_only:
        sizes = f"{len(train_pairs)} training pairs and {args.num_train_epochs} epochs"
        fail(f"{sizes} give no step of {pairs_per_step} pairs: pass more data, or a smaller batch")
    schedule = ds_config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = max(steps, schedule.get("warmup_num_steps", 0) + 1)
    with explain(f"--deepspeed_config {args.deepspeed_config}: DeepSpeed does not accept it, fix it"):
        engine = deepspeed.initialize(model=model, config=ds_config)[0]
    return engine, tokenizer, train_pairs, eval_pairs, ds_config


def pair_metrics(output: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss, accuracy (1, or 0.5 for a tie), margin and both scores of each pair: (5, B), on the device."""
    loss, chosen, rejected = (value.detach().double() for value in output.values())
    margin = chosen - rejected
    return torch.stack([loss.expand_as(margin), (margin.sign() + 1) / 2, margin, chosen, rejected])


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, pairs: list[dict], tokenizer: Tokenizer) -> dict[str, float]:
    """Means of the metrics, the same on any number of ranks; ZeRO-3 needs idle ranks to repeat a pair."""
    size, rank, ranks = engine.train_micro_batch_size_per_gpu(), dist.get_rank(), dist.get_world_size()
    results = torch.zeros(5, len(pairs), dtype=torch.float64, device=engine.device)
    engine.eval()
    for at in bar(range(0, len(pairs), size * ranks), desc="evaluating", delay=2, leave=False):
        mine = slice(at + rank * size, at + (rank + 1) * size)
        metrics = pair_metrics(engine(**collate(pairs[mine] or pairs[:1], tokenizer)))
        results[:, mine] = metrics[:, : len(pairs[mine])]
    engine.train()
    dist.all_reduce(results)
    if not results.isfinite().all():
        fail(f"step {engine.global_steps}: the held-out loss is not finite: check the data, or lower the lr")
    names = "eval_loss", "eval_accuracy", "eval_margin", "eval_chosen_score", "eval_rejected_score"
    return dict(zip(names, results.mean(1).tolist())) | {"eval_ties": int((results[1] == 0.5).sum())}


def resume_run(engine: DeepSpeedEngine, args: argparse.Namespace, config: dict, parts: list) -> tuple:
    """Lock metrics.jsonl; load the newest checkpoint, if any. Returns this run's settings and the file."""
    flags = ("model_name_or_path", "seed", "num_train_epochs", "dropout", "compute_fp32_loss", "loss_on")
    digest, folder, written = sha256(str([*map(len, parts)]).encode()), Path(args.output_dir), 0
    for pair in itertools.chain(*parts):
        digest.update(b"%b%d " % (pair["prompt"], len(pair["chosen"])) + pair["chosen"] + pair["rejected"])
    settings = {name: vars(args)[name] for name in flags} | config
    settings |= {"the data": digest.hexdigest(), "the number of ranks": dist.get_world_size()}
    with explain(f"--output_dir {folder}: cannot be written, or another run is writing there; end it first"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "metrics.jsonl" if dist.get_rank() == 0 else os.devnull, "a", encoding="utf-8")
        on_rank_0(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))  # ranks may outlive a launcher
    if newest := newest_checkpoint(folder):
        with explain(f"{newest}: cannot be read; delete it to resume from the one before"):
            before, written = json.loads((newest / "run.json").read_text())
            if changed := [name for name in before | settings if before.get(name) != settings.get(name)]:
                fail(f"--resume: {', '.join(changed)} changed since {newest}: undo that, or start over")
            engine.load_checkpoint(str(newest.parent), newest.name)
        print(f"resumed from {newest}")
    on_rank_0(lambda: file.truncate(min(written, file.tell())))  # later lines will be written again
    return settings, file


def newest_checkpoint(folder: Path) -> Path | None:
    """Rank 0's view: a shared disk may show other ranks an older listing."""
    return on_rank_0(lambda: max(folder.glob("checkpoints/step-*"), default=None))


def save_checkpoint(engine: DeepSpeedEngine, folder: Path, settings: dict, file: Any) -> None:
    """Write a DeepSpeed checkpoint, rename it once it is complete, and delete all but the newest two."""

    def finish() -> None:
        (folder / "unfinished" / "run.json").write_text(json.dumps([settings, file.tell()]))
        os.replace(folder / "unfinished", folder / f"step-{engine.global_steps:09d}")
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    with explain(f"{folder}: a checkpoint cannot be written; the older ones are intact"):
        engine.save_checkpoint(str(folder), "unfinished", save_latest=False)
        on_rank_0(finish)


def log(engine: DeepSpeedEngine, file: Any, metrics: dict[str, Any]) -> None:
    step = engine.global_steps
    with explain("--output_dir: metrics cannot be written; free space, then rerun with --resume"):
        print(json.dumps({"step": step} | metrics), file=file, flush=True)
    engine.monitor.write_events([(f"Train/{k}", x, step) for k, x in metrics.items() if x is not None])
    if "eval_loss" in metrics:
        print(f"\nstep {step}: {', '.join(f'{name} {x:.4g}' for name, x in metrics.items())}", flush=True)


def stop(message: str, suspects: list[dict], output_dir: str) -> NoReturn:
    """End the run; every rank calls it, and names up to 8 of its own suspect rows."""
    rows = ", ".join(pair["where"] for pair in suspects[:8]) or "the rows that another rank names"
    newest = newest_checkpoint(Path(output_dir)) or "none, see --save_interval"
    fail(f"{message}: check {rows}, or lower the learning rate; last checkpoint: {newest}")


def main() -> None:
    args = parse_args()
    engine, tokenizer, train_pairs, eval_pairs, ds_config = prepare(args)
    if args.eval_only:
        return print(json.dumps(evaluate(engine, eval_pairs, tokenizer)))
    rank, ranks, pairs_per_step = dist.get_rank(), dist.get_world_size(), engine.train_batch_size()
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    epoch_steps, left_over = divmod(len(train_pairs), pairs_per_step)
    total_steps = args.num_train_epochs * epoch_steps
    print(f"{epoch_steps} steps per epoch; {left_over} pairs, others in each epoch, are not used")
    settings, file = resume_run(engine, args, ds_config, [train_pairs, eval_pairs])
    norm_if_skipped = None if engine.fp16_enabled() and engine.dynamic_loss_scale() else math.nan  # NaN stops
    step = engine.global_steps  # 0, or that of the checkpoint
    if step == 0:
        log(engine, file, evaluate(engine, eval_pairs, tokenizer))
    progress = bar(initial=step, total=total_steps, desc="training")
    for epoch in range(step // epoch_steps, args.num_train_epochs):
        shuffled = shuffle_prompts(train_pairs, args.seed + epoch)
        for at in range(step % epoch_steps * pairs_per_step, epoch_steps * pairs_per_step, pairs_per_step):
            began, step = time.perf_counter(), step + 1
            pairs = deal(shuffled[at : at + pairs_per_step], ranks)[rank]
            sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
            for number in range(accumulation):
                # Dropout depends on seed, step and rank only, so that a resumed run draws the same.
                torch.manual_seed(args.seed + (step * accumulation + number) * ranks + rank)
                batch = collate(pairs[number * micro_batch : (number + 1) * micro_batch], tokenizer)
                output = engine(**batch)
                engine.backward(output["loss"])
                if number + 1 < accumulation:
                    engine.step()  # counts the micro-batch; the optimizer steps below
                sums[:3] += pair_metrics(output)[:3].sum(1)
                sums[3] += int(batch["attention_mask"].sum())
            my_loss = sums[0].clone()
            dist.all_reduce(sums)
            *sums, tokens = sums.tolist()  # the only device sync before the optimizer step
            loss, accuracy, margin = (total / pairs_per_step for total in sums)
            if not math.isfinite(loss):
                suspects = [] if my_loss.isfinite() else pairs
                stop(f"step {step}: the loss is not finite", suspects, args.output_dir)
            engine.step()
            norm = engine.get_global_grad_norm() if engine.was_step_applied() else norm_if_skipped
            norm = None if norm is None else float(norm)
            if not math.isfinite(norm or 0):
                stop(f"step {step}: the gradient is not finite (loss {loss:.4g})", pairs, args.output_dir)
            seconds = time.perf_counter() - began
            log(engine, file, {
                "epoch": step / epoch_steps, "loss": loss, "accuracy": accuracy, "margin": margin,
                "grad_norm": norm, "learning_rate": engine.get_lr()[0], "skipped_steps": engine.skipped_steps,
                "pairs_per_second": pairs_per_step / seconds, "tokens_per_second": tokens / seconds,
            })  # fmt: skip
            progress.update()
            progress.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}", refresh=False)
            if step == total_steps or args.eval_interval and step % args.eval_interval == 0:
                log(engine, file, evaluate(engine, eval_pairs, tokenizer))
            if args.save_interval and step % args.save_interval == 0:
                save_checkpoint(engine, Path(args.output_dir, "checkpoints"), settings, file)
    progress.close()
    with explain(f"--output_dir {args.output_dir}: the critic cannot be saved"):
        save_critic_model(engine, tokenizer, args.output_dir)
    print(f"critic saved: load it with create_critic_model({args.output_dir!r}, ..., rlhf_training=True)")


if __name__ == "__main__":
    main()
    dist.barrier()  # else a gloo thread that frees a tensor after Python's end aborts the process (-6)
    dist.destroy_process_group()
