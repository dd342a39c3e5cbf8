# SPDX-License-Identifier: MIT
# Step 2 of RLHF: train a reward model on chosen/rejected pairs with DeepSpeed. Needs critic.py beside it.
"""Train a reward model on preference pairs: `deepspeed train_reward.py --model_name_or_path M --data_path D`.
Without arguments a small critic learns, offline, to tell Python's reference manual from a garbled copy."""

import argparse
import contextlib
import fcntl
import functools
import gzip
import io
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import textwrap
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.config import DeepSpeedConfig
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, logging, set_seed

from critic import RewardModel, Tokenizer, create_critic_model, on_rank_0, save_critic_model


OUTPUTS = "loss", "chosen_mean_scores", "rejected_mean_scores"  # of the model


def parse_args() -> argparse.Namespace:
    formatter, yes_or_no = argparse.ArgumentDefaultsHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", help="pretrained decoder: folder or hub id (omit for the demo)")
    add("--data_path", nargs="+", help="pairs: .jsonl[.gz] files or hub datasets (omit for the demo)")
    add("--eval_path", nargs="+", help="held-out pairs (else those of 10%% of the prompts)")
    add("--max_seq_len", type=int, default=512, help="tokens; pairs with a longer text are dropped")
    add("--num_train_epochs", type=int, default=1, help="passes over the data")
    add("--output_dir", default="output", help="where critic, metrics.jsonl and checkpoints go")
    add("--seed", type=int, default=1234, help="for the value head, the order of the data and dropout")
    add("--dropout", type=float, help="overrides every dropout probability of the model")
    add("--compute_fp32_loss", action=yes_or_no, default=True, help="value head and loss in float32")
    add("--loss_on", choices=["tokens", "end"], default="tokens", help="all after the prefix, or the last")
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
    if min(args.eval_interval, args.save_interval) < 0 or args.num_train_epochs < 1 or args.max_seq_len < 2:
        parser.error("--num_train_epochs must be at least 1, --max_seq_len 2, and the intervals 0 or more")
    return args


def fail(message: str) -> NoReturn:
    sys.exit(f"train_reward.py: error: {message}")


@contextlib.contextmanager
def explain(message: str, width: int = 2000) -> Any:
    """Exit with one line on any exception inside: what is wrong, what to do, and the library's reason."""
    try:
        yield
    except Exception as error:
        why = textwrap.shorten(str(error), width, placeholder=" ...")
        raise SystemExit(f"train_reward.py: error: {message} ({why})") from error


def bar(*args: Any, **options: Any) -> tqdm:
    """A progress bar on rank 0; in a log file it writes twice a minute."""
    pause, hidden = 0.1 if sys.stderr.isatty() else 30, dist.is_initialized() and dist.get_rank() > 0
    return tqdm(*args, disable=hidden, mininterval=pause, maxinterval=max(10, pause), **options)


class Pairs:
    """Pairs of token ids, 4 bytes per token. Indexing by an integer gives one pair, else Pairs."""

    def __init__(self, paths: list[str], ids: torch.Tensor, table: torch.Tensor) -> None:
        self.paths, self.ids = paths, ids  # ids (tokens,) int32: all texts, end to end
        # (pairs, 8) int64: path, line, the prompt's hash and random number, start and end of both in ids
        self.table, self.prompts = table, table[:, 2]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, at: Any) -> Any:
        if not isinstance(at, int):
            return Pairs(self.paths, self.ids, self.table[at])
        path, line, prompt, _, a, b, c, d = self.table[at].tolist()
        where, chosen, rejected = f"{self.paths[path]}:{line}", self.ids[a:b].tolist(), self.ids[c:d].tolist()
        return {"where": where, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_rows(path: str, split: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, JSON value) for each line of a .jsonl[.gz] file, or each row of a hub dataset."""
    found, drop_nulls = 0, None
    with explain(f"{path}: cannot be read; pass a .jsonl[.gz] file, or pip install datasets for the hub", 80):
        if path.endswith((".jsonl", ".jsonl.gz")):
            read = functools.partial(gzip.open if path.endswith(".gz") else open, path, "rb")
            lines, count = read(), sum(1 for _ in read())  # for the progress bar
        else:
            from datasets import load_dataset

            rows = load_dataset(path, split=split)
            lines, count = (json.dumps(row, default=str) for row in rows), len(rows)
            # Parquet gives all messages the same keys, null where absent, which a template would render.
            drop_nulls = lambda item: {key: value for key, value in item.items() if value is not None}
        for number, line in enumerate(bar(lines, total=count, desc="tokenizing", delay=2), 1):
            if line.strip():
                with explain(f"{path}:{number}: not JSON in UTF-8; fix or delete the line", 100):
                    row = json.loads(line, object_hook=drop_nulls)
                    json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate fails here
                found += 1
                yield number, row
    if not found:
        fail(f"{path}: no rows; pass a file with one JSON object per line")


def check_response(value: Any, where: str) -> str | list[dict[str, Any]]:
    """A text, or a list of messages, whose content the template checks. One message becomes a list."""
    value = [value] if isinstance(value, dict) else value
    is_dialogue = isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and not isinstance(message.get("content"), int | float)
        for message in value
    )
    if not value or not (is_dialogue or isinstance(value, str) and value.strip()):
        numbers_and_null = {int: "a number", float: "a number", type(None): "missing"}
        found = numbers_and_null.get(type(value), json.dumps(value)[:50])
        fail(f'{where} is {found}; expected a text, or a list of {{"role", "content"}} messages')
    return value


def check_row(row: Any, where: str) -> tuple[Any, list[list[Any]]]:
    """A row's prompt or None, and its responses in levels from best to worst: chosen and rejected, or one
    level per `ranked` response."""
    row = row if isinstance(row, dict) else {}
    several = lambda value: isinstance(value, list) and value and isinstance(value[0], str | list)
    groups = [(key, row.get(key)) for key in ("chosen", "rejected")]
    groups = [(key, value if several(value) else [value]) for key, value in groups]
    if (ranked := row.get("ranked")) is not None:
        groups = [("ranked", [item]) for item in (ranked if isinstance(ranked, list) else [ranked])]
    levels = [[check_response(item, f'{where}: "{key}"') for item in group] for key, group in groups]
    if len(levels) < 2:
        fail(f'{where}: "ranked" has {len(levels)} responses; expected 2 or more, from best to worst')
    prompt, responses = row.get("prompt") or None, list(itertools.chain(*levels))
    if prompt and not isinstance(prompt, str):
        prompt = check_response(prompt, f'{where}: "prompt"')
    if isinstance(prompt, str) and not any(isinstance(response, str) for response in responses):
        asked = [[m.get("content") for m in response if m["role"] == "user"][:1] for response in responses]
        if asked != [[prompt]] * len(asked):
            fail(f'{where}: "prompt" is not the first user message of each response; pass a list of messages')
        prompt = None  # the dialogues are complete, as in UltraFeedback and Tulu 3
    if len({type(text) for text in (prompt or responses[0], *responses)}) > 1:
        fail(f"{where}: texts and messages are mixed; expected the prompt and all responses in one form")
    return prompt, levels


def render(row: Any, where: str, tokenizer: Tokenizer) -> tuple[str, list[tuple[str, str]], bool]:
    """A row's prompt, by which pairs are grouped; its (chosen, rejected) texts; whether to add BOS, which a
    chat template adds itself. A missing prompt is the common prefix, up to a turn or a line."""
    prompt, levels = check_row(row, where)
    responses = list(itertools.chain(*levels))
    if is_text := isinstance(responses[0], str):
        tag, common = "\n\nAssistant:", os.path.commonprefix(responses)  # HH-RLHF's
        common = common.rpartition(tag)[0] or common.rpartition("\n")[0] or common
        common = prompt.rstrip().removesuffix(tag) if prompt else common
        common, texts = common.strip(), [[(prompt or "") + text for text in level] for level in levels]
    else:
        shared_turns = itertools.takewhile(lambda turns: turns.count(turns[0]) == len(turns), zip(*responses))
        common = json.dumps(prompt or [turns[0] for turns in shared_turns])
        write = functools.partial(tokenizer.apply_chat_template, tools=row.get("tools"), tokenize=False)
        with explain(f"{where}: the chat template fails here; fix the row or the template", 100):
            texts = [[write((prompt or []) + messages).rstrip() for messages in level] for level in levels]
    pairs = [pair for two in itertools.combinations(texts, 2) for pair in itertools.product(*two)]
    return common, pairs, is_text


def read_pairs(paths: list[str], split: str, tokenizer: Tokenizer, max_seq_len: int, seed: int) -> Pairs:
    """Pairs of token ids, each text ending with EOS. Pairs of identical texts are dropped and counted, and so
    are those with a text that is too long: truncated, it would train on half a response."""
    ids, table, eos = array("i"), array("q"), tokenizer.eos_token_id
    count, dropped, lost = 0, Counter(), {}
    rows = (
        (file, line, row, *render(row, f"{path}:{line}", tokenizer))
        for file, path in enumerate(paths)
        for line, row in read_rows(path, split)
    )
    # Fast tokenizers use threads on a batch: here 500 rows, all with or all without BOS.
    for (_, bos), group in itertools.groupby(enumerate(rows), lambda item: (item[0] // 500, item[1][-1])):
        batch, starts = [row for _, row in group], {}
        texts = list({text: None for *_, pairs, _ in batch for pair in pairs for text in pair})
        tokens = tokenizer(texts, add_special_tokens=bos, return_attention_mask=False)["input_ids"]
        for sequence in tokens:
            sequence.extend([eos] if sequence[-1:] != [eos] else [])
        tokens, count = dict(zip(texts, tokens)), count + len(batch)
        for file, line, row, prompt, pairs, _ in batch:
            if prompt in ("", "[]"):
                lost.setdefault(paths[file], Counter()).update(["", *row])  # "" counts the rows
            draw = int(random.Random(f"{seed} {prompt}").random() * 2**53)
            prompt = int.from_bytes(sha256(prompt.encode()).digest()[:8], "big", signed=True)
            for pair in pairs:
                chosen, rejected = (tokens[text] for text in pair)
                if chosen == rejected:
                    dropped["identical"] += 1
                elif max(len(chosen), len(rejected)) > max_seq_len:
                    dropped[f"longer than {max_seq_len} tokens"] += 1
                else:
                    for text in pair:
                        if text not in starts:
                            starts[text] = len(ids)
                            ids.fromlist(tokens[text])
                    a, c = (starts[text] for text in pair)
                    table.extend((file, line, prompt, draw, a, a + len(chosen), c, c + len(rejected)))
    for path, seen in lost.items():
        what = f'{seen.pop("")} rows have no "prompt" and no common prefix, so they train without a prompt'
        keys = textwrap.shorten(", ".join(seen), 60, placeholder=" ...")
        print(f'warning: {path}: {what}; rename the key that holds it to "prompt"; keys: {keys}')
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items())) or "none"
    print(f"{', '.join(paths)}: {len(table) // 8} pairs of {count} rows; dropped: {counts}", flush=True)
    if not table:
        fail("0 pairs remain: see what was dropped, pass more data or a larger --max_seq_len")
    table = torch.asarray(table, dtype=torch.int64).view(-1, 8)
    return Pairs(paths, torch.asarray(ids, dtype=torch.int32), table)


def shuffle_prompts(pairs: Pairs, epoch: int) -> Pairs:
    """Prompts in random order, each with all its pairs: in one batch they overfit less (InstructGPT,
    arXiv:2203.02155, section 3.5), and the critic computes their common prefix once."""
    # Multiplying by an odd number modulo 2**64 gives another random order, and keeps the numbers distinct.
    factor = 2 * random.Random(epoch).getrandbits(62) + 1 if epoch else 1
    return pairs[(pairs.table[:, 3] * factor).argsort(stable=True)]


def count_nodes(pairs: Iterable[dict[str, Any]]) -> int:
    """Content tokens of the prefix tree of these pairs: each distinct (prefix, token) once."""
    rows = sorted(pair[side] for pair in pairs for side in ("chosen", "rejected"))
    return sum(map(len, rows)) - sum(len(os.path.commonprefix(two)) for two in zip(rows, rows[1:]))


def deal(pairs: Pairs, ranks: int) -> list[list[dict[str, Any]]]:
    """Give each rank the same number of pairs and similar token counts, since all wait for the slowest. The
    largest prompts come first, each to the rank with the fewest tokens; a prompt's pairs stay together where
    they fit."""
    dealt, loads, size = [[] for _ in range(ranks)], [0] * ranks, len(pairs) // ranks
    prompts = defaultdict(list)
    for pair in pairs:
        prompts[pair["prompt"]].append(pair)
    for group in sorted(prompts.values(), key=count_nodes, reverse=True):
        while group:
            room = [size - len(part) for part in dealt]
            rank = min((r for r in range(ranks) if room[r]), key=lambda r: (room[r] < len(group), loads[r]))
            part, group = group[: room[rank]], group[room[rank] :]
            dealt[rank] += part
            loads[rank] += count_nodes(part)
    return dealt


def collate(pairs: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """(2B, T) each, on the CPU: the model removes padding there and sends the rest to its device."""
    rows = [{"input_ids": pair[side]} for side in ("chosen", "rejected") for pair in pairs]
    return dict(DataCollatorWithPadding(tokenizer)(rows))


def data_fingerprint(parts: list[Pairs]) -> str:
    """A digest of all prompts and token ids in their order, separately for training and held-out pairs."""
    digest = sha256()
    for part in parts:
        digest.update(f"{len(part)} pairs".encode())
        ids = part.ids.numpy()
        for _, _, prompt, _, a, b, c, d in (row for rows in part.table.split(1000) for row in rows.tolist()):
            digest.update(f"{prompt} {b - a} {d - c}".encode())
            digest.update(ids[a:b])
            digest.update(ids[c:d])
    return digest.hexdigest()


def demonstration(folder: str, seed: int) -> str:
    """Write a small untrained Llama, its tokenizer and its data to `folder`; return the path of the data.
    A pair is a passage of Python's reference manual, and the same with the letters of some words shuffled."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

    rng, rows, path = random.Random(seed), [], Path(folder, "manual.jsonl")
    for words in (topics[name].split() for name in sorted(topics)):
        for at in range(0, len(words) - 39, 90):
            prompt, response = words[at : at + 12], words[at + 12 : at + 40]
            garbled = ["".join(rng.sample(w, len(w))) if rng.random() < 0.25 else w for w in response]
            prompt, chosen, rejected = (" ".join(part) for part in (prompt, response, garbled))
            rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    bpe, texts = ByteLevelBPETokenizer(), [row["prompt"] + row["chosen"] for row in rows]
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    config.save_pretrained(folder)  # a model's own `save_pretrained` writes only on rank 0
    torch.save(AutoModel.from_config(config).state_dict(), Path(folder, "pytorch_model.bin"))
    return str(path)


def prepare(args: argparse.Namespace, ds_config: dict[str, Any], folder: str) -> tuple:
    """All that can fail on bad input. Returns tokenizer, model, training pairs and held-out pairs."""
    set_seed(args.seed)
    ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE", "1"))  # or torchrun's
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, os.cpu_count() // ranks)))  # the tokenizer's
    path, data_path = args.model_name_or_path, args.data_path or []
    if path is None:
        path, data_path = folder, [demonstration(folder, args.seed)]
    with explain(f"--model_name_or_path {path}: pass a hub id or a folder with config.json and tokenizer"):
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    if tokenizer.eos_token is None:
        fail(f"{path}: the tokenizer has no EOS token, with which every text ends; set one and save it")
    if tokenizer.pad_token_id in (
        None,
        tokenizer.eos_token_id,
    ):  # PAD is not EOS; a trained critic cannot grow
        tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token if args.eval_only else "[PAD]"})
    if args.max_seq_len > (limit := getattr(config, "max_position_embeddings", args.max_seq_len)):
        fail(f"--max_seq_len is {args.max_seq_len}, but {path} has {limit} positions: pass at most that")
    read = functools.partial(read_pairs, tokenizer=tokenizer, max_seq_len=args.max_seq_len, seed=args.seed)
    train_pairs = read(data_path, "train") if data_path else None
    if args.eval_path:
        eval_pairs = read(args.eval_path, "test")
        train_pairs = train_pairs or eval_pairs[:0]
    else:  # each prompt is in one part only
        prompts = shuffle_prompts(train_pairs, 0).prompts.unique_consecutive()
        held_out = torch.isin(train_pairs.prompts, prompts[: math.ceil(len(prompts) / 10)])
        train_pairs, eval_pairs = train_pairs[~held_out], train_pairs[held_out]
    if shared := int(torch.isin(eval_pairs.prompts.unique(), train_pairs.prompts).sum()):
        print(f"warning: {shared} prompts of the held-out data are in the training data too")
    print(f"{len(train_pairs)} pairs to train on, {len(eval_pairs)} held out")
    options = {"rlhf_training": args.eval_only, "compute_fp32_loss": args.compute_fp32_loss}
    with explain(f"{path} does not make a critic"):
        model = create_critic_model(path, tokenizer, ds_config, dropout=args.dropout, **options)
    model.train().loss_on = args.loss_on
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return tokenizer, model, train_pairs, eval_pairs


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, pairs: Pairs, tokenizer: Tokenizer) -> dict[str, float]:
    """Accuracy, loss and scores on held-out pairs, bitwise identical on any number of ranks."""
    size, rank, ranks = engine.train_micro_batch_size_per_gpu(), dist.get_rank(), dist.get_world_size()
    results = torch.zeros(3, len(pairs), dtype=torch.float64, device=engine.device)
    engine.eval()
    for at in bar(range(0, len(pairs), size * ranks), desc="evaluating", delay=2, leave=False):
        mine = slice(at + rank * size, at + (rank + 1) * size)
        # Under ZeRO-3 every rank must take part in every forward: an idle rank repeats the first pair.
        output = engine(**collate(pairs[mine] or pairs[:1], tokenizer))
        for result, name in zip(results, OUTPUTS):
            result[mine] = output[name].double()
    engine.train()
    dist.all_reduce(results)
    loss, chosen, rejected = results
    if not loss.isfinite().all():
        fail(f"step {engine.global_steps}: the held-out loss is not finite: check the data, or lower the lr")
    margin, ties = chosen - rejected, int((chosen == rejected).sum())
    means = torch.stack([loss, wins(margin), margin, chosen, rejected]).mean(1).tolist()
    names = ("loss", "accuracy", "margin", "chosen_score", "rejected_score")
    return {f"eval_{name}": mean for name, mean in zip(names, means)} | {"eval_ties": ties}


@torch.no_grad()
def show_rewards(engine: DeepSpeedEngine, pairs: Pairs, tokenizer: Tokenizer) -> None:
    """Print two pairs from their first difference, each word with the reward at its last token; on a terminal
    as a colour, green above the mean."""
    engine.eval()
    style = "\033[4{0}m{1}\033[0m" if sys.stdout.isatty() else "{1}({2:+.1f})"
    numbers = list({prompt: number for number, prompt in enumerate(pairs.prompts.tolist())}.values())[:2]
    for pair, side in itertools.product(map(pairs.__getitem__, numbers), ("chosen", "rejected")):
        ids, words = torch.tensor([pair[side]]), []
        rewards = engine.module.forward_value(ids, torch.ones_like(ids), return_value_only=True)[0].tolist()
        parting = len(os.path.commonprefix([pair["chosen"], pair["rejected"]]))
        texts = [tokenizer.decode(pair[side][:t]) for t in range(parting, len(rewards) + 1)]
        for text, longer, reward in zip(texts, texts[1:], rewards[parting:]):
            begins = not words or longer[len(text) :][:1].isspace()
            words.append((("" if begins else words.pop()[0]) + longer[len(text) :], reward))
        mean = sum(rewards) / len(rewards)
        shown = [style.format(1 + (reward > mean), word.strip(), reward) for word, reward in words[:60]]
        print(f"{side}, end score {rewards[-1]:+.3f}: ... {' '.join(shown)}{' ...' * (len(words) > 60)}")


def start(args: argparse.Namespace) -> tuple[dict[str, Any], int, int]:
    """Initialise torch.distributed. Returns the DeepSpeed config, the pairs of a micro-batch per rank, and
    the number of micro-batches per step."""
    if "RANK" not in os.environ:  # `python train_reward.py`, without a launcher; port 0 is any free one
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if "OMP_NUM_THREADS" not in os.environ:  # else the ranks of a machine compete for its cores
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_SIZE", "1"))))
    logging.set_verbosity_error()  # else transformers warns that the head is newly initialised
    deepspeed.init_distributed(timeout=timedelta(hours=6))  # rank 0 may take hours to write 140 GB
    if dist.get_rank() > 0:
        sys.stdout = io.StringIO()  # only rank 0 prints
    folder, path = Path(args.output_dir), args.deepspeed_config
    names = "metrics.jsonl", "checkpoints", "config.json"
    found = on_rank_0(lambda: [name for name in names if (folder / name).exists()])
    can_resume = args.resume and ("config.json" not in found or newest_checkpoint(folder))
    if not args.eval_only and found and not can_resume:
        found = f"{', '.join(found)}{' but no checkpoint to resume from' if args.resume else ''}"
        fail(
            f"{folder} holds {found}: pass another --output_dir{'' if args.resume else ', or --resume a run'}"
        )
    with explain(
        f"--deepspeed_config {path}: pass JSON for DeepSpeed, with an optimizer, like ds_config.json"
    ):
        ds_config = json.loads(Path(path).read_text(encoding="utf-8"))
        resolved, _ = DeepSpeedConfig(ds_config), args.eval_only or ds_config["optimizer"]
    if args.eval_only:  # needs no optimizer, and without one ZeRO 1 and 2 do nothing
        unused = ["optimizer", "scheduler"] + ["zero_optimization"] * (resolved.zero_optimization_stage < 3)
        ds_config = {name: value for name, value in ds_config.items() if name not in unused}
    return ds_config, resolved.train_micro_batch_size_per_gpu, resolved.gradient_accumulation_steps


def make_engine(args: argparse.Namespace, ds_config: dict, model: RewardModel, steps: int) -> DeepSpeedEngine:
    schedule = ds_config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = max(steps, schedule.get("warmup_num_steps", 0) + 1)
    with explain(f"--deepspeed_config {args.deepspeed_config}: DeepSpeed does not accept it, fix it"):
        return deepspeed.initialize(model=model, config=ds_config)[0]


def resume_run(engine: DeepSpeedEngine, args: argparse.Namespace, config: dict, parts: list[Pairs]) -> tuple:
    """Lock metrics.jsonl, then load the newest checkpoint, if any; exit if settings changed since. Returns
    the fingerprint of the settings, and the file."""
    flags = ("model_name_or_path", "seed", "num_train_epochs", "dropout", "compute_fp32_loss", "loss_on")
    fingerprint = {f"--{name}": getattr(args, name) for name in flags}
    fingerprint |= {f"{name} in the DeepSpeed config": value for name, value in config.items()}
    fingerprint |= {"the data": data_fingerprint(parts), "the number of ranks": dist.get_world_size()}
    folder, files = Path(args.output_dir), []

    def lock() -> None:
        with explain(f"--output_dir {folder}: cannot be written; pass another"):
            folder.mkdir(parents=True, exist_ok=True)
            files.append((folder / "metrics.jsonl").open("a", encoding="utf-8"))
        with explain(f"{files[0].name}: another run is writing here; end its processes first"):
            fcntl.flock(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # ranks may outlive their launcher

    on_rank_0(lock)
    file, written = files[0] if files else io.StringIO(), 0
    if newest := newest_checkpoint(folder):
        with explain(f"{newest}: cannot be read; delete it to resume from the one before"):
            before, written = json.loads((newest / "run.json").read_text())
            if changed := [
                name for name in before | fingerprint if before.get(name) != fingerprint.get(name)
            ]:
                fail(f"--resume: {', '.join(changed)} changed since {newest}: restore it, or start anew")
            engine.load_checkpoint(str(newest.parent), newest.name)
        print(f"resumed from {newest}")
    file.truncate(min(written, file.tell()))  # the lines after the checkpoint will be written again
    return fingerprint, file


def newest_checkpoint(folder: Path) -> Path | None:
    """Rank 0's view: a shared disk may show other ranks an older listing."""
    return on_rank_0(lambda: max(folder.glob("checkpoints/step-*"), default=None))


def save_checkpoint(engine: DeepSpeedEngine, folder: Path, fingerprint: dict, file: IO[str]) -> None:
    """Write a DeepSpeed checkpoint, rename it once it is complete, and delete all but the newest two."""
    errors, save = [], engine.checkpoint_engine.save

    def save_or_note(*args: Any, **options: Any) -> None:
        try:
            save(*args, **options)
        except Exception as error:  # raised below, on every rank: here the others would wait in a barrier
            errors.append(str(error))

    def finish() -> None:
        if failed := list(filter(None, everyones)):
            raise OSError(failed[0])
        (folder / "unfinished" / "run.json").write_text(json.dumps([fingerprint, file.tell()]))
        os.replace(folder / "unfinished", folder / f"step-{engine.global_steps:09d}")
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    with explain(f"{folder}: a checkpoint cannot be written; the older ones are intact"):
        on_rank_0(lambda: (folder / "unfinished").mkdir(parents=True, exist_ok=True))
        engine.checkpoint_engine.save = save_or_note
        engine.save_checkpoint(str(folder), "unfinished", save_latest=False)
        engine.checkpoint_engine.save, everyones = save, [None] * dist.get_world_size()
        dist.all_gather_object(everyones, " ".join(errors))
        on_rank_0(finish)


def log(engine: DeepSpeedEngine, file: IO[str], metrics: dict[str, Any]) -> str:
    """Write metrics on rank 0. Returns the error, if any, which all ranks raise later."""
    step = engine.global_steps
    try:
        print(json.dumps({"step": step} | metrics), file=file, flush=True)
        events = [(f"Train/{name}", value, step) for name, value in metrics.items() if value is not None]
        engine.monitor.write_events(events)
    except OSError as error:
        return f"--output_dir: metrics cannot be written; free space, then rerun with --resume ({error})"
    if "eval_loss" in metrics:
        print(f"\nstep {step}: {', '.join(f'{name} {m:.4g}' for name, m in metrics.items())}", flush=True)
    return ""


def take_step(engine: DeepSpeedEngine) -> float | None:
    """Run `engine.step()`. Returns the gradient's norm before clipping; where it is not finite, no step is
    taken. None if fp16 skipped the step to find its loss scale."""
    norm = None
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # float32 at ZeRO 0: no check in DeepSpeed
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not math.isfinite(norm):
            return norm
    engine.step()
    if not engine.was_step_applied():
        return None if engine.fp16_enabled() and engine.dynamic_loss_scale() else math.nan
    norm = engine.get_global_grad_norm() if norm is None else norm
    return None if norm is None else float(norm)


def sum_metrics(output: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss, wins of the chosen responses, and margins, summed over a micro-batch: (3,), on the device."""
    loss, chosen, rejected = (output[name].detach().double() for name in OUTPUTS)
    margin = chosen - rejected
    return torch.stack([loss * len(margin), wins(margin).sum(), margin.sum()])


def wins(margin: torch.Tensor) -> torch.Tensor:
    return (margin.sign() + 1) / 2  # a tie counts half


def stop(message: str, suspects: Iterable[dict[str, Any]], output_dir: Path) -> NoReturn:
    """End the run on every rank with one message, which names up to 8 suspect rows over all ranks."""
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [pair["where"] for pair in suspects])
    rows = sum(everyones, [])
    rows = ", ".join(rows[:8]) + f" and {len(rows) - 8} more" * (len(rows) > 8)
    newest = newest_checkpoint(output_dir) or "none, see --save_interval"
    fail(f"{message}: check {rows}, or lower the learning rate; last checkpoint: {newest}")


def main() -> None:
    args = parse_args()
    ds_config, micro_batch, accumulation = start(args)
    rank, ranks, output_dir = dist.get_rank(), dist.get_world_size(), Path(args.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model, train_pairs, eval_pairs = prepare(args, ds_config, folder)
    pairs_per_step = micro_batch * accumulation * ranks
    epoch_steps, unused_pairs = divmod(len(train_pairs), pairs_per_step)
    total_steps = args.num_train_epochs * epoch_steps
    if not args.eval_only and not epoch_steps:
        fail(f"{len(train_pairs)} training pairs, a step needs {pairs_per_step}: add data, or cut the batch")
    engine = make_engine(args, ds_config, model, total_steps)
    if args.eval_only:
        print(json.dumps(evaluate(engine, eval_pairs, tokenizer)))
        return show_rewards(engine, eval_pairs, tokenizer)

    fingerprint, file = resume_run(engine, args, ds_config, [train_pairs, eval_pairs])
    print(f"{epoch_steps} steps per epoch; {unused_pairs} pairs, others in each epoch, are left over")
    step = engine.global_steps  # 0, or that of the checkpoint
    log_error = "" if step else log(engine, file, evaluate(engine, eval_pairs, tokenizer))
    progress = bar(initial=step, total=total_steps, desc="training")
    for epoch in range(step // epoch_steps, args.num_train_epochs):
        shuffled = shuffle_prompts(train_pairs, epoch)
        for at in range(step % epoch_steps * pairs_per_step, epoch_steps * pairs_per_step, pairs_per_step):
            began = time.perf_counter()
            pairs = deal(shuffled[at : at + pairs_per_step], ranks)[rank]
            sums = torch.zeros(5, dtype=torch.float64, device=engine.device)
            for number in range(accumulation):
                # Dropout depends on seed, step and rank only, so that a resumed run draws the same.
                torch.manual_seed(args.seed + (step * accumulation + number) * ranks + rank)
                batch = collate(pairs[number * micro_batch : (number + 1) * micro_batch], tokenizer)
                output = engine(**batch)
                engine.backward(output["loss"])
                if number + 1 < accumulation:
                    engine.step()  # counts the micro-batch; the optimizer steps below
                sums[:3] += sum_metrics(output)
                sums[3] += int(batch["attention_mask"].sum())
            sums[4] += bool(log_error)
            my_loss = sums[0].clone()
            dist.all_reduce(sums)
            *sums, tokens, log_failed = sums.tolist()  # the only device sync before the optimizer step
            loss, accuracy, margin = (total / pairs_per_step for total in sums)
            step += 1
            if log_failed:
                on_rank_0(functools.partial(fail, log_error))
            if not math.isfinite(loss):
                stop(f"step {step}: the loss is not finite", [] if my_loss.isfinite() else pairs, output_dir)
            learning_rate, grad_norm = engine.get_lr()[0], take_step(engine)
            if not math.isfinite(grad_norm or 0):
                stop(f"step {step}: the gradient is not finite (loss {loss:.4g})", pairs, output_dir)
            seconds = time.perf_counter() - began
            log_error = log(engine, file, {
                "epoch": step / epoch_steps, "loss": loss, "accuracy": accuracy, "margin": margin,
                "learning_rate": learning_rate, "grad_norm": grad_norm, "skipped_steps": engine.skipped_steps,
                "pairs_per_second": pairs_per_step / seconds, "tokens_per_second": tokens / seconds,
            })  # fmt: skip
            progress.update()
            progress.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}", refresh=False)
            if step == total_steps or args.eval_interval and step % args.eval_interval == 0:
                log_error = log(engine, file, evaluate(engine, eval_pairs, tokenizer)) or log_error
            if args.save_interval and step % args.save_interval == 0:
                save_checkpoint(engine, output_dir / "checkpoints", fingerprint, file)
    progress.close()
    save_critic_model(engine, tokenizer, output_dir)
    on_rank_0(lambda: log_error and fail(log_error))
    print(f"critic saved: load it with create_critic_model({str(output_dir)!r}, ..., rlhf_training=True)")
    show_rewards(engine, eval_pairs, tokenizer)


if __name__ == "__main__":
    main()
    dist.barrier()  # else a gloo thread that frees a tensor after Python's end aborts the process (-6)
    dist.destroy_process_group()
