# SPDX-License-Identifier: MIT
# Step 2 of RLHF: train a reward model on chosen/rejected pairs with DeepSpeed. Needs critic.py beside it.
"""Train a reward model on preference pairs: `deepspeed train_reward.py --model_name_or_path M --data_path D`.

Without arguments a small critic learns, offline, to tell Python's reference manual from a garbled copy.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import random
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

from critic import SHARED_PREFIX_FAMILIES, create_critic_model, round_up, save_critic_model

LOG_INTERVAL = 10  # optimizer steps between two lines of metrics


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name_or_path", help="pretrained decoder, folder or hub id (default: one made on the spot)")
    add("--data_path", nargs="+", help="pairs, .jsonl or .jsonl.gz (default: made from Python's manual)")
    add("--eval_path", nargs="+", help="held-out pairs (default: --eval_fraction of the data)")
    add("--eval_fraction", type=float, default=0.1, help="share of the prompts to hold out")
    add("--max_seq_len", type=int, default=512, help="tokens; pairs with a longer text are left out")
    add("--num_train_epochs", type=int, default=1, help="passes over the data")
    add("--output_dir", default="output", help="where the critic and metrics.jsonl go")
    add("--seed", type=int, default=1234, help="of the fresh head, the order of the data and dropout")
    add("--num_padding_at_beginning", type=int, help="PADs that begin every text (default: counted)")
    add("--dropout", type=float, help="overrides every dropout probability of the model")
    add("--compute_fp32_loss", action="store_true", help="value head and loss in float32")
    add("--loss_on", choices=["tokens", "end"], default="tokens", help="the positions that the loss reads")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--eval_interval", type=int, default=0, help="optimizer steps between evaluations (0: none between)")
    ds_config = str(Path(__file__).with_name("ds_config.json"))
    add("--deepspeed_config", default=ds_config, help="batch, optimizer, schedule, precision, ZeRO stage")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    for name, fits, remedy in [
        ("eval_fraction", 0 < args.eval_fraction < 1, "greater than 0 and less than 1"),
        ("max_seq_len", args.max_seq_len >= 2, "at least 2"),
        ("num_train_epochs", args.num_train_epochs >= 1, "at least 1"),
        ("eval_interval", args.eval_interval >= 0, "0 or more"),
        ("model_name_or_path", args.model_name_or_path or not args.data_path, "given where --data_path is"),
        ("data_path", args.data_path or not args.model_name_or_path, "given where --model_name_or_path is"),
    ]:
        if not fits:
            parser.error(f"--{name} is {getattr(args, name)}: it must be {remedy}")
    return args


# ---- data: files -> texts -> token ids ----


def read_rows(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a .jsonl or .jsonl.gz file, each with the `file:line` for an error about it."""
    rows = []
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            lines = file.readlines()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read, pass a .jsonl or .jsonl.gz file ({error})") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{where}: not a JSON object in UTF-8, mend or delete the line ({error})"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {type(row).__name__}, not an object with chosen and rejected")  # noqa: TRY004
        rows.append((where, row))
    if not rows:
        raise ValueError(f"{path}: no rows, one JSON object a line is needed")
    return rows


def render(where: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """A row's (prompt, chosen text, rejected text), the texts with the prompt; messages via the template.

    Without a prompt it is what the two dialogues begin with, up to the last turn of HH-RLHF's if there is
    one: it only serves to keep the pairs of one prompt on one side of the split.
    """
    prompt, answers = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    kinds = {type(value) for value in answers + [prompt] * ("prompt" in row)}
    if kinds == {str}:
        if not all(answer.strip() for answer in answers):
            raise ValueError(f"{where}: chosen or rejected is empty, give both an answer or delete the line")
        chosen, rejected = ((prompt or "") + answer for answer in answers)
        if prompt is None:
            common = os.path.commonprefix(answers)
            prompt = common[: common.rfind("\n\nAssistant:")] if "\n\nAssistant:" in common else common
        return prompt, chosen, rejected
    if kinds != {list}:
        got = ", ".join(f"{key}: {type(row.get(key)).__name__}" for key in ("prompt", "chosen", "rejected"))
        raise ValueError(
            f"{where}: chosen, rejected (and prompt, if any) must all be texts or all be messages; got {got}"
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: messages, but the tokenizer has no chat template; pass texts, or a model with one"
        )
    dialogues = [(prompt or []) + answer for answer in answers]
    for message in itertools.chain(*dialogues):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f'{where}: a message must be {{"role": text, "content": text}}; got {str(message)[:80]}'
            )
    if not all(dialogues):
        raise ValueError(
            f"{where}: chosen or rejected has no message, give both an answer or delete the line"
        )
    if prompt is None:
        prompt = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*dialogues))]
    try:
        texts = [tokenizer.apply_chat_template(dialogue, tokenize=False).rstrip() for dialogue in dialogues]
    except Exception as error:  # Jinja's own, or whatever the template raises
        raise ValueError(f"{where}: the chat template refuses these messages ({error})") from error
    return json.dumps(prompt), *texts


def tokenize(
    rows: list[tuple[str, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, max_seq_len: int, name: str
) -> list[dict[str, Any]]:
    """Pairs of token ids, each text with EOS at its end, and the divergence; unfit pairs are left out and counted.

    Truncating a pair's end would train on half an answer, so a pair that is too long is left out whole.
    """
    pairs, left_out, lead = [], Counter(), is_lead()
    for where, row in tqdm(rows, desc=f"tokenizing {name}", disable=not lead, delay=2):
        prompt, *texts = render(where, row, tokenizer)
        # A lone surrogate has no UTF-8, which fast tokenizers need; a chat template has written BOS itself.
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        encoded = tokenizer(texts, add_special_tokens=isinstance(row["chosen"], str))["input_ids"]
        chosen, rejected = (
            ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id] for ids in encoded
        )
        if chosen == rejected:
            left_out["identical"] += 1
        elif min(len(chosen), len(rejected)) < 2:
            left_out["empty"] += 1
        elif max(len(chosen), len(rejected)) > max_seq_len:
            left_out[f"longer than {max_seq_len} tokens"] += 1
        else:
            divergence = next(t for t, (c, r) in enumerate(itertools.zip_longest(chosen, rejected)) if c != r)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "divergence": divergence})
    if lead:
        counts = "".join(f", {count} {reason}" for reason, count in sorted(left_out.items())) or ", none"
        print(f"{name}: {len(pairs)} pairs remain of {len(rows)}; left out{counts}", flush=True)
    return pairs


def split_by_prompt(pairs: list[dict[str, Any]], fraction: float, seed: int) -> tuple[list, list]:
    """(training, held-out) pairs, with no prompt on both sides."""
    prompts = sorted({pair["prompt"] for pair in pairs})
    held_out = set(random.Random(seed).sample(prompts, math.ceil(fraction * len(prompts))))
    sides = [[pair for pair in pairs if (pair["prompt"] in held_out) is side] for side in (False, True)]
    return sides[0], sides[1]


def cost(pair: dict[str, Any], model: torch.nn.Module) -> int:
    """Tokens that the critic computes for a pair: p + 2 (e - p) as one row, else two rows of e."""
    p, c, r = pair["divergence"], len(pair["chosen"]), len(pair["rejected"])
    if not model.share_prefix or model.config.model_type not in SHARED_PREFIX_FAMILIES:
        return 2 * max(c, r)
    return c + r - p if model.loss_on == "end" else 2 * max(c, r) - p


def collate(
    pairs: list[dict[str, Any]], pad_id: int, max_seq_len: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """B pairs as input_ids and attention_mask (2B, T), padded right to a multiple that kernels like."""
    rows = [torch.tensor(pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    longest = max(map(len, rows))
    # One more row, dropped below, sets the width.
    rows.append(torch.zeros(min(round_up(longest), max(longest, max_seq_len)), dtype=torch.long))
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)[:-1]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)[:-1]
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


# ---- the demonstration: real text that every Python ships ----


def demonstration(folder: str, seed: int) -> tuple[list, list]:
    """Write a small untrained Llama and its tokenizer to `folder`; return (training, held-out) rows.

    A pair is a passage of the reference manual, and the same with the letters of every fourth word of its
    second part shuffled.
    The held-out topics are ones that neither the model nor the tokenizer has seen.
    """
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

    rng = random.Random(seed)
    names = sorted(topics)
    rng.shuffle(names)
    sides = []
    for part in (names[len(names) // 10 :], names[: len(names) // 10]):
        rows = []
        for name in part:
            words = topics[name].split()
            for at in range(0, len(words) - 39, 20):
                passage = words[at : at + 40]
                shuffled = [
                    "".join(rng.sample(w, len(w))) if rng.random() < 0.25 else w for w in passage[12:]
                ]
                prompt, chosen, rejected = (" ".join(text) for text in (passage[:12], passage[12:], shuffled))
                rows.append(
                    (f"topic {name}", {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
                )
        sides.append(rows)
    bpe = ByteLevelBPETokenizer()
    texts = [row["prompt"] + row["chosen"] for _, row in sides[0]]
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    set_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    return sides[0], sides[1]


# ---- the run ----


def is_lead() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine, pairs: list[dict], pad_id: int, max_seq_len: int
) -> dict[str, Any]:
    """Accuracy, loss and scores on held-out pairs, to the bit the same on any number of ranks.

    The batches do not depend on the number of ranks; each rank takes its share.
    """
    size = engine.train_micro_batch_size_per_gpu()
    order = sorted(range(len(pairs)), key=lambda index: cost(pairs[index], engine.module))
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = torch.zeros(3, len(pairs), dtype=torch.float64, device=engine.device)  # loss, chosen, rejected
    engine.eval()
    for at in tqdm(
        range(0, len(batches), ranks), desc="evaluating", disable=not is_lead(), delay=2, leave=False
    ):
        # Under ZeRO-3 every rank must take part in every forward: one without a share repeats the last batch.
        mine = batches[min(at + rank, len(batches) - 1)]
        output = engine(**collate([pairs[index] for index in mine], pad_id, max_seq_len, engine.device))
        if at + rank < len(batches):
            index = torch.tensor(mine, device=engine.device)
            results[0, index] = output["loss"].double()
            results[1, index] = output["chosen_mean_scores"].double()
            results[2, index] = output["rejected_mean_scores"].double()
    engine.train()
    dist.all_reduce(results)
    loss, chosen, rejected = results.cpu()
    return {
        "eval_loss": loss.mean().item(),
        "eval_accuracy": (chosen > rejected).double().mean().item(),
        "eval_margin": (chosen - rejected).mean().item(),
        "eval_chosen_score": chosen.mean().item(),
        "eval_rejected_score": rejected.mean().item(),
    }


def read_ds_config(path: str) -> dict[str, Any]:
    """The DeepSpeed config, checked against what this machine can do before anything is loaded."""
    try:
        ds_config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--deepspeed_config {path}: not a JSON file, pass one such as ds_config.json ({error})"
        ) from error
    accelerator = get_accelerator()
    for name, supported in (("fp16", accelerator.is_fp16_supported), ("bf16", accelerator.is_bf16_supported)):
        if ds_config.get(name, {}).get("enabled") and not supported():
            raise ValueError(
                f"{path}: {name} is enabled, which this {accelerator.device_name()} does not support: disable it"
            )
    return ds_config


def prepare(args: argparse.Namespace) -> tuple:
    """All that can go wrong through a user's input: the config, the data, the model. Nothing is written."""
    ds_config = read_ds_config(args.deepspeed_config)
    try:
        resolved = DeepSpeedConfig(ds_config)
    except Exception as error:  # assertions and errors of its own
        raise ValueError(f"{args.deepspeed_config}: DeepSpeed refuses it ({error})") from error
    micro, accumulation = resolved.train_micro_batch_size_per_gpu, resolved.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as folder:
        if args.model_name_or_path is None:
            train_rows, eval_rows = demonstration(folder, args.seed)
        else:
            folder = args.model_name_or_path
            train_rows = [row for path in args.data_path for row in read_rows(path)]
            eval_rows = [row for path in args.eval_path or [] for row in read_rows(path)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{folder}: the tokenizer has no EOS token, with which every text ends: set one and save it"
            )
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # EOS is content here: PAD must differ
        limit = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", args.max_seq_len)
        if args.max_seq_len > limit:
            raise ValueError(
                f"--max_seq_len is {args.max_seq_len}, but {folder} has {limit} positions: pass {limit} or less"
            )
        if args.num_padding_at_beginning is None:
            begins = itertools.takewhile(
                lambda token: token == tokenizer.pad_token_id, tokenizer("a")["input_ids"]
            )
            args.num_padding_at_beginning = len(list(begins))
        train_pairs = tokenize(train_rows, tokenizer, args.max_seq_len, "training data")
        if eval_rows:
            eval_pairs = tokenize(eval_rows, tokenizer, args.max_seq_len, "held-out data")
        else:
            train_pairs, eval_pairs = split_by_prompt(train_pairs, args.eval_fraction, args.seed)
        shared = {pair["prompt"] for pair in train_pairs} & {pair["prompt"] for pair in eval_pairs}
        if shared and is_lead():
            print(
                f"warning: {len(shared)} prompts of the held-out data are in the training data too",
                flush=True,
            )
        for name, pairs, least in (
            ("training", train_pairs, dist.get_world_size()),
            ("held-out", eval_pairs, 1),
        ):
            if len(pairs) < least:
                raise ValueError(
                    f"{len(pairs)} {name} pairs remain, at least {least} are needed: see what was left out "
                    "above, pass more data or a larger --max_seq_len"
                )
        set_seed(args.seed)
        model = create_critic_model(
            folder,
            tokenizer,
            ds_config,
            args.num_padding_at_beginning,
            dropout=args.dropout,
            compute_fp32_loss=args.compute_fp32_loss,
        )
    model.loss_on = args.loss_on
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    lengths = [cost(pair, model) for pair in train_pairs]
    sampler = DistributedLengthGroupedSampler(
        micro, num_replicas=dist.get_world_size(), rank=dist.get_rank(), seed=args.seed, lengths=lengths
    )
    total_steps = args.num_train_epochs * math.ceil(len(sampler) / micro) // accumulation
    if total_steps == 0:
        raise ValueError(
            f"{args.deepspeed_config}: an epoch has fewer batches than gradient_accumulation_steps: lower it"
        )
    schedule = ds_config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = total_steps
    return ds_config, tokenizer, model, train_pairs, eval_pairs, sampler, total_steps


def batches(sampler: DistributedLengthGroupedSampler, micro: int, epochs: int):
    """Lists of `micro` indices of like length, epoch after epoch; the order of the batches is shuffled."""
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        grouped = [indices[at : at + micro] for at in range(0, len(indices), micro)]
        # The same on every rank: all take like lengths at once.
        random.Random(sampler.seed + epoch).shuffle(grouped)
        yield from grouped


def main() -> None:
    args = parse_args()
    if "RANK" not in os.environ:  # `python train_reward.py`, without a launcher
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Else the ranks of one machine fight for its cores.
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_SIZE", "1"))))
    deepspeed.init_distributed()
    try:
        ds_config, tokenizer, model, train_pairs, eval_pairs, sampler, total_steps = prepare(args)
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"train_reward.py: error: {error}")
    torch.manual_seed(args.seed + dist.get_rank())  # dropout differs from rank to rank
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    pad_id, micro = tokenizer.pad_token_id, engine.train_micro_batch_size_per_gpu()
    metrics_file = (output_dir / "metrics.jsonl").open("w", encoding="utf-8") if is_lead() else None
    progress = tqdm(total=total_steps, desc="training", disable=not is_lead())

    def log(metrics: dict[str, float]) -> None:
        if metrics_file is not None:
            print(json.dumps({"step": engine.global_steps} | metrics), file=metrics_file, flush=True)
            engine.monitor.write_events(
                [(f"Train/{name}", value, engine.global_steps) for name, value in metrics.items()]
            )
            tqdm.write(
                f"step {engine.global_steps}: "
                + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            )

    log(evaluate(engine, eval_pairs, pad_id, args.max_seq_len))
    losses = []
    for indices in batches(sampler, micro, args.num_train_epochs):
        if engine.global_steps == total_steps:
            break  # batches too few for another optimizer step
        batch = collate([train_pairs[index] for index in indices], pad_id, args.max_seq_len, engine.device)
        loss = engine(**batch)["loss"]
        boundary = engine.is_gradient_accumulation_boundary()
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
        if boundary:
            progress.update()
            if engine.global_steps % LOG_INTERVAL == 0 or engine.global_steps == total_steps:
                mean_loss = torch.stack(losses).mean()
                dist.all_reduce(mean_loss)
                losses = []
                log({"loss": mean_loss.item() / dist.get_world_size(), "lr": engine.get_lr()[0]})
            if (
                engine.global_steps == total_steps
                or args.eval_interval
                and engine.global_steps % args.eval_interval == 0
            ):
                log(evaluate(engine, eval_pairs, pad_id, args.max_seq_len))
    progress.close()

    save_critic_model(engine, tokenizer, output_dir)
    if is_lead():
        print(
            f"critic saved in {output_dir}: load it with create_critic_model({str(output_dir)!r}, ..., rlhf_training=True)"
        )
    examples = eval_pairs[:3]
    with torch.no_grad():
        engine.eval()
        scores = engine(**collate(examples, pad_id, args.max_seq_len, engine.device))
    for index, pair in enumerate(examples if is_lead() else []):
        text = {
            side: tokenizer.decode(pair[side], skip_special_tokens=True) for side in ("chosen", "rejected")
        }
        for side in text:
            print(f"{scores[f'{side}_mean_scores'][index].item():+8.3f} {side:8s} ...{text[side][-150:]!r}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
