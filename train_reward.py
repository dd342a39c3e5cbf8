# SPDX-License-Identifier: MIT
# Step 2 of RLHF: train a reward model on chosen/rejected pairs with DeepSpeed. Needs critic.py beside it.
"""Train a reward model on preference pairs: `deepspeed train_reward.py --model_name_or_path M --data_path D`.

Without arguments a small critic learns, offline, to tell Python's reference manual from a garbled copy.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

from critic import can_share_prefix, create_critic_model, round_up, save_critic_model

MAX_SKIPPED = 5  # steps in a row whose loss or gradient is not finite, after which the run stops
KEPT_CHECKPOINTS = 2
ROLES = {"system", "developer", "user", "assistant", "tool"}
# Sections of the DeepSpeed config that report, and change no weight: a resumed run may differ in them.
REPORTING = {
    "comms_logger", "csv_monitor", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print",
    "tensorboard", "wall_clock_breakdown", "wandb",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name_or_path", help="pretrained decoder, folder or hub id; none: made on the spot")
    add("--data_path", nargs="+", help="pairs: .jsonl[.gz], hub owner/name; none: Python's manual")
    add("--eval_path", nargs="+", help="held-out pairs; none: --eval_fraction of the data")
    add("--eval_fraction", type=float, default=0.1, help="share of the prompts to hold out")
    add("--max_seq_len", type=int, default=512, help="tokens; pairs with a longer text are left out")
    add(
        "--num_train_epochs",
        type=int,
        default=1,
        help="passes over the data; 0: only evaluate a trained critic",
    )
    add("--output_dir", default="output", help="where critic, metrics.jsonl and checkpoints go")
    add("--seed", type=int, default=1234, help="of the fresh head, the order of the data and dropout")
    add("--num_padding_at_beginning", type=int, help="PADs that begin every text; none: counted")
    add("--dropout", type=float, help="overrides every dropout probability of the model")
    add("--compute_fp32_loss", action="store_true", help="value head and loss in float32")
    add("--loss_on", choices=["tokens", "end"], default="tokens", help="the positions that the loss reads")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--eval_interval", type=int, default=0, help="optimizer steps between evaluations (0: none between)")
    add("--save_interval", type=int, default=0, help="optimizer steps between checkpoints (0: none)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir, if any")
    ds_config = str(Path(__file__).with_name("ds_config.json"))
    add("--deepspeed_config", default=ds_config, help="batch, optimizer, schedule, precision, ZeRO stage")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    data = args.data_path or (args.eval_path and not args.num_train_epochs)
    for name, fits, remedy in [
        ("eval_fraction", 0 < args.eval_fraction < 1, "greater than 0 and less than 1"),
        ("max_seq_len", args.max_seq_len >= 2, "at least 2"),
        ("num_train_epochs", args.num_train_epochs >= 0, "0 or more"),
        ("eval_interval", args.eval_interval >= 0, "0 or more"),
        ("save_interval", args.save_interval >= 0, "0 or more"),
        ("model_name_or_path", args.model_name_or_path or not data, "given where --data_path is"),
        ("model_name_or_path", args.model_name_or_path or args.num_train_epochs, "given to evaluate"),
        ("data_path", data or not args.model_name_or_path, "given where --model_name_or_path is"),
    ]:
        if not fits:
            parser.error(f"--{name} is {getattr(args, name)}: it must be {remedy}")
    return args


# ---- data: files -> texts -> token ids ----


def read_rows(path: str, split: str = "train") -> list[tuple[str, dict[str, Any]]]:
    """The rows of a .jsonl or .jsonl.gz file, or of a hub dataset's split, each with where it came from."""
    if (
        re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        and not path.endswith((".jsonl", ".gz"))
        and not Path(path).exists()
    ):
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"{path} is not a file; to read it from the hub: pip install datasets"
            ) from error
        try:
            return [(f"{path}:{split}:{n}", row) for n, row in enumerate(load_dataset(path, split=split))]
        except Exception as error:  # of the hub, the network, the format
            raise ValueError(f"{path}: split {split} cannot be read from the hub ({error})") from error
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
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: unknown role {message['role']!r}, use one of {sorted(ROLES)}")
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
    """Pairs of token ids, each text ending with EOS, and the divergence; unfit pairs are left out and counted.

    Truncating a pair's end would train on half an answer, so a pair that is too long is left out whole.
    """
    pairs, left_out = [], Counter()
    for where, row in bar(rows, desc=f"tokenizing {name}", delay=2):
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
    if is_lead():
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
    shared = c + r - p if model.loss_on == "end" else 2 * max(c, r) - p
    shares = model.share_prefix and can_share_prefix(model.config, max(c, r), round_up(shared))
    return shared if shares else 2 * max(c, r)


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

    A pair is a passage of the reference manual, and the same with the letters of every fourth word or so of
    its second part shuffled. The held-out topics are ones that neither the model nor the tokenizer has seen.
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


def is_lead() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def bar(*args: Any, **kwargs: Any) -> tqdm:
    """A progress bar on rank 0; in a log file it writes twice a minute only."""
    return tqdm(*args, disable=not is_lead(), mininterval=0.1 if sys.stderr.isatty() else 30, **kwargs)


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine, pairs: list[dict], collate_options: dict[str, Any]
) -> dict[str, float]:
    """Accuracy, loss and scores on held-out pairs, to the bit the same on any number of ranks.

    The batches do not depend on the number of ranks; each rank takes its share.
    """
    size = engine.train_micro_batch_size_per_gpu()
    order = sorted(range(len(pairs)), key=lambda index: cost(pairs[index], engine.module))
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = torch.zeros(3, len(pairs), dtype=torch.float64, device=engine.device)  # loss, chosen, rejected
    engine.eval()
    for at in bar(range(0, len(batches), ranks), desc="evaluating", delay=2, leave=False):
        # Under ZeRO-3 every rank must take part in every forward: one without a share repeats the last batch.
        mine = batches[min(at + rank, len(batches) - 1)]
        output = engine(**collate([pairs[index] for index in mine], **collate_options))
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


@torch.no_grad()
def show_examples(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    collate_options: dict[str, Any],
) -> None:
    """Print the scores of a few pairs, so that a reader sees what a reward model does."""
    engine.eval()
    scores = engine(**collate(pairs[:3], **collate_options))
    if not is_lead():
        return
    print("end scores of held-out pairs, and how the texts end:")
    for index, pair in enumerate(pairs[:3]):
        for side in ("chosen", "rejected"):
            text = tokenizer.decode(pair[side], skip_special_tokens=True)[-150:]
            print(f"{scores[f'{side}_mean_scores'][index].item():+8.3f} {side:8s} ...{text!r}")


# ---- the run's input ----


def read_ds_config(path: str) -> tuple[dict[str, Any], int, int]:
    """The DeepSpeed config, checked before anything is loaded; the micro-batch a rank; the accumulation."""
    try:
        ds_config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--deepspeed_config {path}: pass a JSON file such as ds_config.json ({error})"
        ) from error
    try:
        resolved = DeepSpeedConfig(ds_config)
    except Exception as error:  # assertions and errors of its own
        raise ValueError(f"--deepspeed_config {path}: DeepSpeed refuses it, mend it ({error})") from error
    if "optimizer" not in ds_config:
        raise ValueError(f"--deepspeed_config {path}: it has no optimizer, add one: see ds_config.json")
    accelerator = get_accelerator()
    for name, supported in (("fp16", accelerator.is_fp16_supported), ("bf16", accelerator.is_bf16_supported)):
        if ds_config.get(name, {}).get("enabled") and not supported():
            raise ValueError(
                f"{path}: {name} is enabled, which this {accelerator.device_name()} does not support: disable it"
            )
    return ds_config, resolved.train_micro_batch_size_per_gpu, resolved.gradient_accumulation_steps


def prepare(args: argparse.Namespace, ds_config: dict[str, Any]) -> tuple:
    """Read, tokenize and check the data, and make the model: what a user's input can spoil. Writes nothing.

    Returns:
        The tokenizer, the model, the training pairs and the held-out ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        if args.model_name_or_path is None:
            train_rows, eval_rows = demonstration(folder, args.seed)
        else:
            folder = args.model_name_or_path
            train_rows = [row for path in args.data_path or [] for row in read_rows(path)]
            eval_rows = [row for path in args.eval_path or [] for row in read_rows(path, "test")]
        try:
            tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        except Exception as error:  # of the hub, of a tokenizer file
            raise ValueError(
                f"--model_name_or_path {folder}: config and tokenizer cannot be read; pass a folder that "
                f"save_pretrained wrote, or a hub id ({error})"
            ) from error
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{folder}: the tokenizer has no EOS token, with which every text ends: set one and save it"
            )
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # EOS is content here: PAD must differ
        limit = getattr(config, "max_position_embeddings", args.max_seq_len)
        if args.max_seq_len > limit:
            raise ValueError(
                f"--max_seq_len is {args.max_seq_len}, but {folder} has {limit} positions: pass {limit} or less"
            )
        if args.num_padding_at_beginning is None:
            begins = itertools.takewhile(
                lambda token: token == tokenizer.pad_token_id, tokenizer("a")["input_ids"]
            )
            args.num_padding_at_beginning = len(list(begins))
        train_pairs = train_rows and tokenize(train_rows, tokenizer, args.max_seq_len, "training data")
        if eval_rows:
            eval_pairs = tokenize(eval_rows, tokenizer, args.max_seq_len, "held-out data")
        else:
            train_pairs, eval_pairs = split_by_prompt(train_pairs, args.eval_fraction, args.seed)
        shared = {pair["prompt"] for pair in train_pairs} & {pair["prompt"] for pair in eval_pairs}
        if shared and is_lead():
            print(f"warning: {len(shared)} prompts of the held-out data are in the training data too")
        least = dist.get_world_size() if args.num_train_epochs else 0
        for name, pairs, needed in (("training", train_pairs, least), ("held-out", eval_pairs, 1)):
            if len(pairs) < needed:
                raise ValueError(
                    f"{len(pairs)} {name} pairs remain, at least {needed} are needed: see what was left out "
                    "above, pass more data or a larger --max_seq_len"
                )
        set_seed(args.seed)
        model = create_critic_model(
            folder,
            tokenizer,
            ds_config,
            args.num_padding_at_beginning,
            rlhf_training=args.num_train_epochs == 0,
            dropout=args.dropout,
            compute_fp32_loss=args.compute_fp32_loss,
        )
    model.loss_on = args.loss_on
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return tokenizer, model, train_pairs, eval_pairs


# ---- a run that was killed goes on ----


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """Oldest first. A checkpoint gets a name of this form only when every rank has written its part."""
    return sorted(output_dir.glob("checkpoints/step-*"))


def find_checkpoint(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. Without `resume` an `output_dir` that holds a run is refused."""
    found = [name for name in ("metrics.jsonl", "checkpoints", "config.json") if (output_dir / name).exists()]
    checkpoints = whole_checkpoints(output_dir)
    if "config.json" in found and not checkpoints:
        raise ValueError(
            f"--output_dir {output_dir} already holds a model, and no checkpoint to --resume from: pass another"
        )
    if found and not resume:
        raise ValueError(
            f"--output_dir {output_dir} already holds {', '.join(found)}: pass --resume to go on with that run, "
            "or another --output_dir"
        )
    return checkpoints[-1] if checkpoints else None


def what_decides(
    args: argparse.Namespace, ds_config: dict, model: torch.nn.Module, data: dict[str, list]
) -> dict[str, Any]:
    """All that the result depends on, by the name under which a refusal to resume mentions it."""
    free = {"data_path", "eval_path", "deepspeed_config", "model_name_or_path"}  # their content counts, below
    free |= {"output_dir", "local_rank", "resume", "save_interval", "eval_interval", "gradient_checkpointing"}
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    decides = {f"--{name}": value for name, value in vars(args).items() if name not in free}
    decides |= {f"{name} in the DeepSpeed config": ds_config[name] for name in set(ds_config) - REPORTING}
    decides |= {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in data.items()}
    decides |= {
        "the model's config": json.dumps(config, default=str),
        "the number of ranks": dist.get_world_size(),
    }
    return json.loads(json.dumps(decides))  # a copy: "auto" is filled in later


def require_same(checkpoint: Path, decides: dict[str, Any]) -> None:
    before = json.loads((checkpoint / "decides.json").read_text())
    changed = [
        name for name in sorted(before.keys() | decides.keys()) if before.get(name) != decides.get(name)
    ]
    flags = [name for name in changed if name.startswith("--")]
    if flags:  # which change the split of the data, or the model's config
        changed = flags + [name for name in changed if name.endswith("DeepSpeed config") or "ranks" in name]
    if changed:
        raise ValueError(
            f"--resume: {', '.join(changed)} changed since {checkpoint} was written: put it back, or start "
            "anew with another --output_dir"
        )


def require_alone(file: IO[str]) -> None:
    """Ranks outlive a launcher that was killed, and would go on writing: one run at a time has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{file.name}: another run is writing here, end its processes first") from error
    except OSError:  # a file system without locks
        pass


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, output_dir: Path, decides: dict, **state: Any) -> None:
    """Write a DeepSpeed checkpoint, name it when it is whole, and drop all but the newest."""
    folder = output_dir / "checkpoints"
    try:
        engine.save_checkpoint(str(folder), tag="unfinished", client_state=state, save_latest=False)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{folder}: a checkpoint cannot be written, the older ones are whole ({error})"
        ) from error
    if is_lead():  # the engine has waited for every rank
        (folder / "unfinished" / "decides.json").write_text(json.dumps(decides))
        os.replace(folder / "unfinished", folder / f"step-{engine.global_steps:09d}")
        for old in whole_checkpoints(output_dir)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    dist.barrier()


# ---- the run ----


def batches(sampler: DistributedLengthGroupedSampler, micro: int, epochs: int):
    """(epoch, `micro` indices of like length), the same order of lengths on every rank.

    The sampler goes from long to short again and again; shuffled, the batches of a stretch are of all lengths.
    """
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        grouped = [indices[at : at + micro] for at in range(0, len(indices), micro)]
        random.Random(sampler.seed + epoch).shuffle(grouped)
        for number, group in enumerate(grouped):
            yield epoch + (number + 1) / len(grouped), group


def take_step(engine: deepspeed.DeepSpeedEngine) -> tuple[float | None, bool]:
    """`engine.step()` that no gradient which is not finite gets through.

    DeepSpeed skips such a step in bf16, in fp16 and under ZeRO; in plain float32 it is done here.

    Returns:
        The gradient's norm before clipping, where DeepSpeed tells it, and whether the step was taken.
    """
    norm, hook, plain = None, None, isinstance(engine.optimizer, torch.optim.Optimizer)
    if plain and engine.is_gradient_accumulation_boundary():
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not math.isfinite(norm):  # an optimizer passes over parameters without gradient
            hook = engine.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
    engine.step()
    if hook is not None:
        hook.remove()
    if not plain and engine.get_global_grad_norm() is not None:
        norm = float(engine.get_global_grad_norm())
    return norm, engine.was_step_applied() and (norm is None or math.isfinite(norm))


@contextlib.contextmanager
def told_plainly():
    """What a user's input did wrong, or a full disk, is told in a line and ends the run."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"train_reward.py: error: {error}")


def main() -> None:
    args = parse_args()
    if "RANK" not in os.environ:  # `python train_reward.py`, without a launcher; port 0 is any free one
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Else the ranks of one machine fight for its cores.
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_SIZE", "1"))))
    deepspeed.init_distributed()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    output_dir, checkpoint = Path(args.output_dir), None

    with told_plainly():
        ds_config, micro, accumulation = read_ds_config(args.deepspeed_config)
        if args.num_train_epochs:
            checkpoint = find_checkpoint(output_dir, args.resume)
        tokenizer, model, train_pairs, eval_pairs = prepare(args, ds_config)
        decides = {}
        if checkpoint is not None or args.save_interval:
            data = {"the training data": train_pairs, "the held-out data": eval_pairs}
            decides = what_decides(args, ds_config, model, data)
        if checkpoint is not None:
            require_same(checkpoint, decides)
        sampler = DistributedLengthGroupedSampler(
            micro * ranks, num_replicas=ranks, rank=rank, seed=args.seed, drop_last=True,
            lengths=[cost(pair, model) for pair in train_pairs],
        )  # fmt: skip
        total_steps = args.num_train_epochs * math.ceil(len(sampler) / micro) // accumulation
        if args.num_train_epochs and not total_steps:
            raise ValueError(
                f"{args.deepspeed_config}: the data has fewer batches than gradient_accumulation_steps: lower it"
            )
        schedule = ds_config.get("scheduler", {}).get("params", {})
        if not total_steps:
            ds_config.pop("scheduler", None)
        elif schedule.get("total_num_steps") == "auto":
            schedule["total_num_steps"] = total_steps
        try:
            engine, *_ = deepspeed.initialize(model=model, config=ds_config)
        except Exception as error:  # assertions and type errors of its own
            raise ValueError(f"{args.deepspeed_config}: DeepSpeed refuses it, mend it ({error})") from error
    collate_options = {
        "pad_id": tokenizer.pad_token_id,
        "max_seq_len": args.max_seq_len,
        "device": engine.device,
    }

    if not args.num_train_epochs:
        metrics = evaluate(engine, eval_pairs, collate_options)
        if is_lead():
            print(json.dumps(metrics))
        show_examples(engine, tokenizer, eval_pairs, collate_options)
        dist.destroy_process_group()
        return

    state = {"metrics_bytes": 0, "skipped": 0, "in_a_row": 0}
    if checkpoint is not None:
        loaded = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)[1]
        state = {name: loaded[name] for name in state}
    with told_plainly():
        output_dir.mkdir(parents=True, exist_ok=True)
        if is_lead():
            metrics_file = (output_dir / "metrics.jsonl").open("a", encoding="utf-8")
            require_alone(metrics_file)
            shutil.rmtree(output_dir / "checkpoints" / "unfinished", ignore_errors=True)
            metrics_file.truncate(state["metrics_bytes"])  # lines after the checkpoint will be written again
    progress = bar(total=total_steps, initial=engine.global_steps, desc="training")

    def log(metrics: dict[str, float | None]) -> None:
        if is_lead():
            # JSON has no NaN.
            metrics = {k: v if v is not None and math.isfinite(v) else None for k, v in metrics.items()}
            print(json.dumps({"step": engine.global_steps} | metrics), file=metrics_file, flush=True)
            state["metrics_bytes"] = metrics_file.tell()
            known = [(f"Train/{k}", v, engine.global_steps) for k, v in metrics.items() if v is not None]
            engine.monitor.write_events(known)

    def log_evaluation() -> None:
        metrics = evaluate(engine, eval_pairs, collate_options)
        log(metrics)
        if is_lead():
            line = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            progress.write(f"step {engine.global_steps}: {line}")

    if checkpoint is None:
        log_evaluation()
    done = engine.global_steps * accumulation  # batches that the checkpoint has seen
    sums = torch.zeros(5, dtype=torch.float64, device=engine.device)  # loss, correct, margin, pairs, tokens
    start = time.perf_counter()
    engine.train()
    upcoming = enumerate(batches(sampler, micro, args.num_train_epochs))
    for number, (epoch, indices) in itertools.islice(upcoming, done, total_steps * accumulation):
        # Dropout depends on seed, batch and rank alone: a resumed run draws what the first would have drawn.
        torch.manual_seed(args.seed + number * ranks + rank)
        batch = collate([train_pairs[index] for index in indices], **collate_options)
        output = engine(**batch)
        loss, margin = output["loss"], output["chosen_mean_scores"] - output["rejected_mean_scores"]
        tokens = batch["attention_mask"].sum()
        pairs = torch.full_like(loss, len(indices))
        row = [loss.detach() * pairs, (margin > 0).sum(), margin.detach().sum(), pairs, tokens]
        sums += torch.stack([value.double() for value in row])
        # A loss that is not finite spoils the gradient, also where autograd would have made it finite.
        engine.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        boundary, learning_rate = engine.is_gradient_accumulation_boundary(), engine.get_lr()[0]
        grad_norm, taken = take_step(engine)
        if not boundary:
            continue
        dist.all_reduce(sums)
        loss, correct, margin, pairs, tokens = sums.tolist()
        sums.zero_()
        loss, accuracy, seconds = loss / pairs, correct / pairs, time.perf_counter() - start
        # In fp16 DeepSpeed skips steps to find the loss scale: there only the loss tells.
        taken_or_scaled = math.isfinite(loss) and (taken or engine.fp16_enabled())
        state["in_a_row"] = 0 if taken_or_scaled else state["in_a_row"] + 1
        state["skipped"] += not taken
        log({
            "epoch": epoch, "loss": loss, "accuracy": accuracy, "margin": margin / pairs,
            "learning_rate": learning_rate, "grad_norm": grad_norm, "skipped_steps": state["skipped"],
            "pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds,
        })  # fmt: skip
        progress.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}, {pairs / seconds:.1f} pairs/s")
        progress.update()
        if state["in_a_row"] == MAX_SKIPPED:
            progress.close()
            last = next(reversed(whole_checkpoints(output_dir)), "none, see --save_interval")
            sys.exit(
                f"train_reward.py: error: step {engine.global_steps}: loss {loss}, gradient norm {grad_norm}, "
                f"{MAX_SKIPPED} steps in a row not finite and skipped; lower the learning rate, or look for "
                f"weights that are not finite; last checkpoint: {last}"
            )
        last_step = engine.global_steps == total_steps
        if last_step or args.eval_interval and engine.global_steps % args.eval_interval == 0:
            log_evaluation()
        if args.save_interval and engine.global_steps % args.save_interval == 0:
            with told_plainly():
                save_checkpoint(engine, output_dir, decides, **state)
        start = time.perf_counter()
    progress.close()

    with told_plainly():
        save_critic_model(engine, tokenizer, output_dir)
    if is_lead():
        print(f"critic saved: load it with create_critic_model({str(output_dir)!r}, ..., rlhf_training=True)")
    show_examples(engine, tokenizer, eval_pairs, collate_options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
