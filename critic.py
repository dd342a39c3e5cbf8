# SPDX-License-Identifier: MIT
# The reward/critic model of RLHF in one file, after DeepSpeed-Chat's `create_critic_model` and `RewardModel`.
"""A pretrained decoder with a linear value head: trained on pairs, then PPO's critic and reward model.

Chapter 1 is the whole model on a padded batch. Chapter 2 makes it fast and loads it under ZeRO-3.
Letters in the shape comments: B pairs; R rows (2B in training: B chosen, then B rejected); T columns of the
input; E columns that are read; H the hidden size; N nodes of the prefix tree.
"""

import contextlib
import copy
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification

torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients on Hopper with an explicit mask (pytorch#196678)


# ---- Chapter 1: the reward model on a padded batch ----


def align(
    input_ids: Tensor, attention_mask: Tensor | None, pad_id: int, num_padding_at_beginning: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the content of each row to column 0, so that left, right and interior padding are one case.

    With a mask, content is exactly where it is 1. Without one, content runs from the first id that is not PAD to
    the last, and includes `num_padding_at_beginning` ids before the first: OPT starts every text with BOS, and
    with pad = eos its BOS is PAD (DeepSpeedExamples #455).

    Args: input_ids, attention_mask (R, T), on any device; a device other than the CPU is read once.

    Returns, on the CPU:
        ids (R, T): content, then PAD. is_key (R, T): whether attention sees the token; without a mask it sees
        padding too, as in DeepSpeed-Chat. columns (R, T): where each token was. length (R,): content tokens.
    """
    mask_shape = (input_ids if attention_mask is None else attention_mask).shape
    if input_ids.dim() != 2 or not input_ids.numel() or mask_shape != input_ids.shape:
        shapes = f"input_ids has shape {tuple(input_ids.shape)}, attention_mask {tuple(mask_shape)}"
        raise ValueError(f"{shapes}: pass (rows, tokens) for both")
    ids, n, t = input_ids.cpu().long(), num_padding_at_beginning, torch.arange(input_ids.size(1))
    if attention_mask is not None:
        content = attention_mask.cpu().bool()  # (R, T)
    else:
        is_text = F.pad((ids != pad_id).long(), (0, n))  # (R, T + n)
        begun, not_over = is_text.cumsum(1)[:, n:], is_text.flip(1).cumsum(1).flip(1)[:, : len(t)]
        content = (begun > 0) & (not_over > 0)
    length = content.sum(1)
    if not length.all():
        raise ValueError(f"row {length.argmin()} of input_ids is only padding: drop the row, or its pair")
    columns = (~content).int().argsort(dim=1, stable=True)  # content first, in its order
    inside = t < length[:, None]
    ids = ids.gather(1, columns).masked_fill(~inside, pad_id)
    if ids.min() < 0:
        raise ValueError("input_ids has ids below 0 in its content: pass token ids, not labels")
    return ids, torch.ones_like(inside) if attention_mask is None else inside, columns, length


def ranking_loss(rewards: Tensor, length: Tensor, divergence: Tensor, loss_on: str) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss of B pairs, `-log sigmoid(chosen - rejected)`. Returns loss (), end scores (2B,).

    "tokens" averages it over the positions [p, e), from the divergence p to the end e of the longer row, as
    DeepSpeed-Chat does; padding of the shorter row takes part (DeepSpeedExamples #316). "end" compares only the
    end scores, as InstructGPT does (arXiv:2203.02155). An identical pair gives log 2 and no gradient.

    Args: rewards (2B, E), aligned at column 0. length (2B,). divergence (B,): e for an identical pair.
    """
    end_scores = rewards.gather(1, length[:, None] - 1).squeeze(1)  # (2B,)
    p, e = divergence[:, None], torch.maximum(*length.chunk(2))[:, None]  # (B, 1)
    t = torch.arange(rewards.size(1), device=rewards.device)
    if loss_on == "end":
        rewards, t = end_scores[:, None], e - 1  # one position per pair
    chosen, rejected = rewards.chunk(2)  # (B, E) or (B, 1)
    difference = (chosen - rejected).masked_fill(t < p, 0)  # before p the rows are equal, but for dropout
    counted = (t >= torch.minimum(p, e - 1)) & (t < e)  # an identical pair counts one difference of 0
    loss = torch.where(counted, -F.logsigmoid(difference), 0)
    loss = loss.sum(1, dtype=torch.float32) / counted.sum(1)  # (B,); a sum in fp16 would pass 65,504
    return loss.mean().to(rewards.dtype), end_scores


class ValueHead(nn.Linear):
    """`nn.Linear(H, 1, bias=False)`, on request in float32: bf16 scores near 4 move in steps of 0.03 and tie."""

    in_float32 = False

    def forward(
        self, hidden: Tensor
    ) -> Tensor:  # ZeRO-3 gathers the weight only for the module's own forward
        if not self.in_float32:
            return super().forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """A decoder with a value head: r(t), one scalar per token. Names and state dict are DeepSpeed-Chat's.

    Args:
        base_model: the decoder without its language-model head, as AutoModel returns it.
        tokenizer: only its pad_token_id is used, which should differ from EOS.
        num_padding_at_beginning: PAD ids that start every text: 1 for OPT where pad = eos = bos and batches
            come without a mask, else 0.
        compute_fp32_loss: value head and loss in float32.

    Attributes: loss_on, "tokens" (default) or "end"; share_prefix, False turns the prefix tree off.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: Tokenizer,
        num_padding_at_beginning: int = 0,
        compute_fp32_loss: bool = False,
    ) -> None:
        super().__init__()
        name, self.config = type(base_model).__name__, base_model.config
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token_id: set tokenizer.pad_token, not to EOS")
        check_decoder(self.config, name)
        if isinstance(base_model, PreTrainedModel) and base_model.base_model is not base_model:
            raise ValueError(f"{name} has a head: pass its base_model, as AutoModel does")
        self.PAD_ID = tokenizer.pad_token_id
        self.num_padding_at_beginning = num_padding_at_beginning
        self.loss_on, self.share_prefix = "tokens", True
        self.rwtransformer = base_model
        width = getattr(self.config, "word_embed_proj_dim", self.config.hidden_size)  # OPT-350m: narrower
        place = {"dtype": base_model.dtype, "device": base_model.device}
        self.v_head = ValueHead(width, 1, bias=False, **place)
        self.v_head.in_float32 = compute_fp32_loss
        # Its device is the model's. The parameters' is not under ZeRO-3 with offload, where they lie on the CPU.
        self.register_buffer("on_device", torch.empty(0, **place), persistent=False)

    def gradient_checkpointing_enable(self, options: dict[str, Any] | None = None, **others: Any) -> None:
        # The reentrant kind loses every gradient where embeddings are frozen.
        self.rwtransformer.gradient_checkpointing_enable(options or {"use_reentrant": False}, **others)

    def __getattr__(self, name: str) -> Any:  # what transformers 6 calls it, and the methods that turn it off
        return getattr(self.rwtransformer, name) if "_checkpointing_" in name else super().__getattr__(name)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **others: None
    ) -> dict[str, Tensor]:
        """The ranking loss of B pairs. Left, right and no padding are three ways to write the same row.

        Args:
            input_ids (2B, T): chosen rows, then the rejected ones in the same order. Best on the CPU: the model
                then reads nothing back from its device.
            attention_mask (2B, T): 1 at content. Without one PAD marks padding, which attention then sees.

        Returns loss (), and the end scores chosen_mean_scores and rejected_mean_scores (B,), with gradients.

        Raises ValueError: names the argument or the row, and what to do.
        """
        if self.loss_on not in ("tokens", "end"):
            raise ValueError(f"loss_on is {self.loss_on!r}: use 'tokens' or 'end'")
        ids, is_key, _, length = self._align(input_ids, attention_mask, others)
        if len(ids) % 2:
            raise ValueError(f"input_ids has {len(ids)} rows: pass B chosen rows, then their B rejected ones")
        shorter, longer = torch.aminmax(torch.stack(length.chunk(2)), dim=0)  # (B,)
        chosen, rejected = ids.chunk(2)  # (B, T)
        same = (chosen == rejected) & (torch.arange(ids.size(1)) < shorter[:, None])
        divergence = same.int().cumprod(1).sum(1)  # (B,); an identical pair's is its end
        read = longer.repeat(2) if self.loss_on == "tokens" else length  # (2B,)
        rewards = self._rewards(ids, is_key, read)  # (2B, E)
        loss, scores = ranking_loss(rewards, self._send(length), self._send(divergence), self.loss_on)
        return dict(zip(("loss", "chosen_mean_scores", "rejected_mean_scores"), (loss, *scores.chunk(2))))

    def forward_value(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
        use_cache: bool = False,
        **others: None,
    ) -> Tensor | dict[str, Tensor]:
        """The values of R rows, one per token: what PPO's critic and the frozen reward model return.

        Args:
            input_ids, attention_mask (R, T): as in `forward`; PPO pads prompts left, responses right.
            prompt_length: DeepSpeed-Chat's; checked to be in (1, T] unless `return_value_only`, otherwise unused.

        Returns values (R, T), 0 at padding. Unless `return_value_only`, a dict of `values` and
        `chosen_end_scores` (R,), the rewards at each row's last content token.

        Raises ValueError: names the argument or the row, and what to do.
        """
        ids, is_key, columns, length = self._align(input_ids, attention_mask, others)
        if not return_value_only and not 1 < prompt_length <= ids.size(1):
            raise ValueError(f"prompt_length is {prompt_length}: it must be in 2 to {ids.size(1)}")
        rewards = self._rewards(ids, is_key, length)  # (R, E)
        last, columns = self._send(length[:, None] - 1), self._send(columns[:, : rewards.size(1)])
        content = torch.arange(rewards.size(1), device=rewards.device) <= last
        values = rewards.new_zeros(ids.shape).scatter(1, columns, rewards.where(content, 0))
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": rewards.gather(1, last).squeeze(1)}

    def _align(self, input_ids: Tensor, attention_mask: Tensor | None, others: dict) -> tuple[Tensor, ...]:
        ignored = "return_dict", "num_items_in_batch"  # trainers pass these, and others as None or False
        if given := [k for k, x in others.items() if x is not None and x is not False and k not in ignored]:
            raise ValueError(f"{', '.join(given)}: not supported, leave it out")
        return align(input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning)

    def _rewards(self, ids: Tensor, is_key: Tensor, read: Tensor) -> Tensor:
        """r(t) of aligned rows, up to the last of the `read` (R,) tokens of each: (R, E), on the model's device."""
        E = int(read.max())
        ids, is_key = ids[:, :E], is_key[:, :E]
        if self.share_prefix and tree_is_exact(self.rwtransformer):
            return tree_rewards(self, ids, is_key, read)
        inputs = {"input_ids": self._send(ids), "attention_mask": self._send(is_key.long())}
        return self.v_head(self.rwtransformer(**inputs, use_cache=False)[0]).squeeze(-1)

    def _send(self, x: Tensor) -> Tensor:
        """To the model's device. From memory that is not pinned, the copy would be a device sync."""
        return (x.pin_memory() if self.on_device.is_cuda else x).to(self.on_device.device, non_blocking=True)


def check_decoder(config: PretrainedConfig, name: str) -> None:
    if not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{name} is multimodal: pass its text decoder, such as model.language_model")
    encoders = transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    encodes = any(type(config) in mapping for mapping in encoders) or not hasattr(config, "vocab_size")
    encodes |= config.is_encoder_decoder or getattr(config, "is_causal", True) is False
    looks_ahead = getattr(config, "use_bidirectional_attention", None)  # Gemma's "vision" leaves text causal
    if encodes or looks_ahead not in (None, False, "vision"):
        raise ValueError(f"{name} is a {config.model_type} model: a critic needs a causal decoder")


def reward_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' `...ForSequenceClassification` of a family, made of its parts where there is none."""
    hf_class = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if hf_class is None:
        decoder = transformers.MODEL_MAPPING[type(config)]
        base = decoder.__base__  # GranitePreTrainedModel, ...
        name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
        # transformers looks into the module of a class, to see how it calls its experts.
        parts = {"__module__": base.__module__, "base_model_prefix": decoder.base_model_prefix or "model"}
        hf_class = type(name, (GenericForSequenceClassification, base), parts)
        warnings.warn(f"transformers has no {name}: only create_critic_model will read what is saved")
    return hf_class


def load_weights(path: str, config: PretrainedConfig, dtype: torch.dtype, trained: bool) -> PreTrainedModel:
    """Backbone and head in one piece, memory-mapped; nothing is initialised that the file then overwrites.
    `trained`: a reward checkpoint, whose keys must all fit; else a base model, which lacks the head."""
    hf_class = reward_class(config)
    prefix = hf_class.base_model_prefix
    # How others name what is `score` here: DeepSpeed-Chat, OpenRLHF, UltraRM and Eurus, PKU Beaver.
    heads = f"v_head|value_head|regression_head|score_head|{getattr(config, 'value_head_prefix', 'v_head')}"
    key_mapping = {
        r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": f"{prefix}.",  # a multimodal model's decoder
        r"^rwtra(?:nsformer|nrsformer)\.": f"{prefix}.",  # DeepSpeed-Chat's name, and its older spelling
        rf"^(?:{heads})\.": "score.",
        rf"^(?!{prefix}\.|score\.)(.+)": rf"{prefix}.\1",  # a decoder that was saved by itself
    }

    def init(self, config: PretrainedConfig) -> None:
        hf_class.__init__(self, config)
        self.base_model_prefix = ""  # else transformers 4.57 adds the prefix too, to some keys

    loader = type(hf_class.__name__, (hf_class,), {"__init__": init, "__module__": hf_class.__module__})
    options = {"key_mapping": key_mapping, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = loader.from_pretrained(path, config=config, dtype=dtype, **options)
    except Exception as error:  # each format has its own
        raise ValueError(f"the weights in {path} cannot be read, download them again: {error}") from error
    model.base_model_prefix = prefix
    kinds = "missing", "unexpected", "mismatched"
    check_keys(path, trained, {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in kinds})
    return model


def check_keys(path: str, trained: bool, found: dict[str, list[str]]) -> None:
    # Causal masks, which transformers once saved with GPT-2, GPT-J, GPT-Neo and GPT-BigCode, are not weights.
    masks = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")
    surplus = [key for key in found["unexpected"] if not masks.search(key)]
    no_head, found["unexpected"] = "score.weight" in found["missing"], surplus if trained else []
    if not trained:  # from a base model other weights are dropped: a vision tower, the language model's head
        found = {kind: [key for key in keys if "score.weight" not in key] for kind, keys in found.items()}
        if not no_head:
            warnings.warn(f"the value head of {path} is reinitialised: rlhf_training=True keeps it")
    hint = "train a base model first (rlhf_training=False)" if no_head else "download them again"
    if any(key.startswith("score.") for key in surplus):
        hint = "a critic's head is one row without a bias (here called score): this one cannot be loaded"
    elif no_head and not all(re.search("lm_head|embed_out", key) for key in surplus):
        hint = "if one of these is the head, rename its key to score.weight, of shape (1, hidden_size)"
    if problems := "; ".join(f"{kind} {', '.join(keys[:5])}" for kind, keys in found.items() if keys):
        raise ValueError(f"the weights in {path} do not fit: {problems}; {hint}")


def override_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Set every dropout probability of a config, nested ones too: `dropout`, `resid_pdrop`, ..."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and less than 1")
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            override_dropout(value, dropout)
        elif re.search("dropout|pdrop$", name) and type(value) in (int, float):
            vars(config)[name] = dropout or type(value)(0)  # past validation, which types MPT's as an integer


def read_config(path: str, dropout: float | None) -> PretrainedConfig:
    if Path(path, "adapter_config.json").exists():
        raise ValueError(f"{path} is a PEFT adapter: merge it (merge_and_unload), and save_critic_model")
    if any(Path(path).glob("*model_states.pt")):
        raise ValueError(f"{path} is a DeepSpeed checkpoint: pass the folder that save_critic_model wrote")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # else custom code asks a question
    if not config.is_encoder_decoder:
        config = config.get_text_config(decoder=True)  # a multimodal model's decoder is one like any other
    check_decoder(config, path)
    config.num_labels = 1
    if dropout is not None:
        override_dropout(config, dropout)
    return config


def create_critic_model(
    model_name_or_path: str,
    tokenizer: Tokenizer,
    ds_config: dict[str, Any] | None,
    num_padding_at_beginning: int = 0,
    rlhf_training: bool = False,
    dropout: float | None = None,
    zero_stage: int = 0,
    compute_fp32_loss: bool = False,
) -> RewardModel:
    """Make the critic from a pretrained decoder (step 2), or load it from a reward checkpoint (step 3).

    Args:
        model_name_or_path: a local folder or a hub id. With `rlhf_training` a checkpoint of DeepSpeed-Chat's
            (`rwtransformer.*`, `v_head.weight`), or one of transformers' `AutoModelForSequenceClassification`
            with one label, which TRL and OpenRLHF write too; safetensors or pickle, whole or sharded.
        tokenizer: with a pad_token_id; embeddings grow to its length, rounded up to a multiple of 8.
        ds_config: the DeepSpeed config: bf16 or fp16 sets the dtype (else float32), ZeRO stage 3 partitions.
        rlhf_training: load backbone and head from a reward checkpoint; else the head is newly initialised.
        dropout: in [0, 1), overrides every dropout probability of the config; None leaves them.
        zero_stage: the original's argument; the stage in `ds_config` is what counts.

    Raises ValueError: names the argument, file or key at fault and the remedy. OSError: no such folder or id.
    """
    ds_config, dtype = ds_config or {}, torch.float32
    for name, half in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        if (enabled := (ds_config.get(name) or {}).get("enabled", False)) not in (True, False):
            raise ValueError(f'{name} in ds_config has "enabled": {enabled!r}: write true or false')
        dtype = half if enabled else dtype
    zero = ds_config.get("zero_optimization") or {}
    if zero_stage not in (0, stage := zero.get("stage", 0)):
        raise ValueError(f"zero_stage is {zero_stage}, the stage in ds_config {stage}: leave zero_stage out")
    config = read_config(model_name_or_path, dropout)
    grows = len(tokenizer) > config.vocab_size
    if grows and rlhf_training:
        sizes = f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        raise ValueError(f"{sizes}: use the tokenizer saved in {model_name_or_path}")
    hf_model = load_weights(model_name_or_path, config, dtype, rlhf_training)
    if grows:
        hf_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    model = RewardModel(hf_model.base_model, tokenizer, num_padding_at_beginning, compute_fp32_loss)
    if rlhf_training:
        model.v_head.weight = hf_model.score.weight
    model.config.pad_token_id = tokenizer.pad_token_id
    if stage == 3:
        partition(model, zero)
    return model


def on_rank_0(run: Callable[[], Any]) -> Any:
    """What `run()` returns on rank 0, on every rank; an error there is raised on every rank, so that none waits."""
    outcome = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = run()
        except (Exception, SystemExit) as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def save_critic_model(model: nn.Module, tokenizer: Tokenizer, output_dir: str | os.PathLike) -> None:
    """Write the critic as transformers' `AutoModelForSequenceClassification` reads it; TRL and vLLM read it too.

    Every rank calls it; under ZeRO-3 parameters are gathered one by one, and rank 0 alone writes. The files are
    written to a staging directory in `output_dir` and moved, the weights last: an older critic stays whole until
    then. `model` is a RewardModel or the DeepSpeed engine around it, at any ZeRO stage.

    Raises on every rank: OSError, `output_dir` cannot be written; ValueError, the model has other keys.
    """
    model = getattr(model, "module", model)
    config = copy.deepcopy(model.config)
    # "regression": else transformers' pipeline returns the sigmoid of the score.
    config.update({"num_labels": 1, "pad_token_id": model.PAD_ID, "problem_type": "regression"})
    with torch.device("meta"):  # a template knows names, shards and config, and holds no data
        template = reward_class(config)(config).to(model.rwtransformer.dtype)
    names = {"rwtransformer": template.base_model_prefix, "v_head": "score"}
    parts = ((key.partition("."), value) for key, value in model.state_dict(keep_vars=True).items())
    state = {f"{names.get(first, first)}.{rest}": value for (first, _, rest), value in parts}
    if differing := sorted(state.keys() ^ template.state_dict().keys()):
        remedies = {
            "_orig_mod": "pass model._orig_mod",
            "lora_": "merge the adapters first (merge_and_unload)",
        }
        found = [remedy for part, remedy in remedies.items() if part in str(differing)] + [
            "surplus or missing"
        ]
        raise ValueError(f"not saved as {type(template).__name__}: {found[0]}: {', '.join(differing[:4])}")
    gather = contextlib.nullcontext
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        from deepspeed.runtime.zero import GatheredParameters as gather
    writes = not dist.is_initialized() or dist.get_rank() == 0
    for key, value in state.items():
        with gather([value]):
            state[key] = value.detach().to("cpu", copy=True) if writes else None
    on_rank_0(lambda: write_folder(Path(output_dir), template, state, tokenizer))


def write_folder(final: Path, template: PreTrainedModel, state: dict, tokenizer: Tokenizer) -> None:
    staging = final / ".writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        template.save_pretrained(staging, state_dict=state)
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else one set later is not saved
        tokenizer.save_pretrained(staging)
        new = sorted(os.listdir(staging), key=lambda name: (".safetensors" in name, name))
        for name in new:
            os.replace(staging / name, final / name)
        # What an earlier model left would be read instead of these files, or with them.
        weights, texts = (
            r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?",
            r"(chat|added|special)_\w+\.\w+",
        )
        for name in set(os.listdir(final)) - set(new):
            if re.fullmatch(f"{weights}|{texts}", name):
                (final / name).unlink()
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise OSError(f"{final} cannot be written, free space or pass another folder ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---- Chapter 2: each distinct (prefix, token) once, and loading under ZeRO-3 ----

# Families where a test saw the tree equal to a padded batch: all layers are causal attention over given positions,
# full or in a window, through transformers' AttentionInterface. Others run padded batches, as wrong is worse than
# slow: ALiBi counts columns (BLOOM, MPT, Falcon); attention is local, chunked, linear, indexed or the family's own
# (GPT-Neo, Llama 4, Qwen3-Next, GPT-J); sdpa has no sinks and cannot soft-cap scores (GPT-OSS, Gemma 2).
TREE_FAMILIES = (
    "afmoe apertus arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 diffllama "
    "dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text gemma3n_text gemma4_text glm glm4 "
    "glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense "
    "hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama longcat_flash mellum "
    "minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat olmo olmo2 olmo3 "
    "olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen2_vl_text qwen2_5_vl_text qwen3 qwen3_moe qwen3_vl_text "
    "qwen3_vl_moe_text seed_oss smollm3 solar_open starcoder2 youtu"
).split()
TREE_ATTENTION = "prefix_tree"  # the name of `tree_attention` in transformers' registry


def tree_is_exact(backbone: PreTrainedModel) -> bool:
    """Whether the tree equals a padded batch on this backbone; if so, its attention is ready for it."""
    config = backbone.config
    by_interface = backbone._supports_attention_backend and config._attn_implementation == "sdpa"
    if by_interface and config.model_type in TREE_FAMILIES:
        backbone.set_attn_implementation(TREE_ATTENTION)  # without a tree it is sdpa
    return config._attn_implementation == TREE_ATTENTION


def tree_rewards(model: RewardModel, ids: Tensor, is_key: Tensor, read: Tensor) -> Tensor:
    """`RewardModel._rewards` with each distinct (prefix, token) computed once."""
    tree = PrefixTree(ids, is_key, read, model._send)
    # The backbone passes keyword arguments that it does not know on to its attention, and so `tree` arrives in
    # `tree_attention`. A 4-D mask keeps the backbone from making one of its own. This one is a placeholder, and
    # of integers: sdpa fails on it, should a backbone drop `tree`.
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.long, device=tree.ids.device)
    position_ids = tree.columns
    if model.config.model_type == "opt":  # transformers' OPT gives padding that a mask hides position -1
        position_ids = position_ids.where(tree.is_key, -1)
    inputs = {"input_ids": tree.ids[None], "position_ids": position_ids[None], "attention_mask": placeholder}
    hidden = model.rwtransformer(**inputs, tree=tree, use_cache=False)[0]  # (1, N, H)
    return model.v_head(hidden).flatten()[tree.node_index]


def block_of(queries: Tensor, keys: Tensor, device: torch.device) -> Tensor:
    """Which rows share a block, (rows, n): those with equal numbers here. queries, keys (rows,): lengths.

    On a CPU padding costs more than a call does, so lengths in a block differ by less than 64. On an accelerator a
    call costs more: one block while it has at most 8192 queries, else two, split at half of the most queries."""
    if device.type == "cpu":
        return torch.stack([queries, keys], 1).add(63) // 64
    longest = queries.max()
    return ((2 * queries > longest) & (len(queries) * longest > 8192)).long()[:, None]


class PrefixTree:
    """Each distinct (prefix, token) of a batch, once: all that a causal model has to compute.

    A token's hidden state depends on the tokens before it in its row and on nothing else, so rows with a common
    prefix share its states. In sorted order such rows are neighbours. Each row introduces what it does not
    share with the row above, from the first difference to its end; these tokens are the N nodes:

        rows    P Q a b      introduced    P Q a b      nodes, N = 7    P Q a b c d R
                P Q a c d                  . . . c d    columns         0 1 2 3 3 4 1
                P R                        . R

    Args:
        ids, is_key (R, E): as from `align`. read (R,): tokens of each row that are read.
        send: moves a tensor to the model's device.

    Attributes:
        ids, columns, is_key (N,): the packed sequence, the position of each node in its row, and whether
            attention sees it.
        node_index (R, E): the node of each token; arbitrary where nothing is read.
        blocks: the rows again, as attention needs them, each a pair (query_nodes (rows, Q), key_nodes (rows, K)).
            The nodes that a row introduces are its queries, those of its whole path its keys. Padding repeats
            the row's last query; a key that pads lies behind all queries of its row, and none sees it.
        output_index (N,): where each node's query stands in the blocks, one after the other.
    """

    @torch.compiler.disable  # its shapes differ from batch to batch
    def __init__(self, ids: Tensor, is_key: Tensor, read: Tensor, send: Callable[[Tensor], Tensor]) -> None:
        t = torch.arange(ids.size(1))
        # Tokens merge where this is equal: an id that is hidden is not the same id seen. -2 is never read.
        merge_key = (2 * ids + is_key).masked_fill(t >= read[:, None], -2)  # (R, E)
        rows, row_of = torch.unique(merge_key, dim=0, return_inverse=True)  # sorted; identical rows merge
        differs = F.pad(rows[1:] != rows[:-1], (0, 0, 1, 0), value=True)
        new = (differs.cumsum(1) > 0) & (rows >= 0)  # what each row introduces
        # Nodes are numbered row by row. The node at a column is that of the last row so far to introduce it.
        nodes = torch.where(new, new.flatten().cumsum(0).view_as(new) - 1, 0).cummax(0).values
        self.node_index = send(nodes[row_of])
        self.ids, self.is_key = send(rows[new] // 2), send(rows[new] % 2 == 1)
        self.columns = send(t.expand_as(rows)[new])

        queries, keys, ends = new.sum(1), (rows % 2).sum(1), (rows >= 0).sum(1)  # (rows,)
        block = torch.unique(block_of(queries, keys, self.ids.device), dim=0, return_inverse=True)[1]
        self.blocks, output_index, offset = [], torch.empty(len(self.ids), dtype=torch.long), 0
        nodes = F.pad(nodes, (0, 7))  # lengths round up to 8, which kernels want
        for mine in (block == number for number in range(block.max() + 1)):
            Q, K = (x[mine].max().add(7).item() // 8 * 8 for x in (queries, keys))
            count, end = queries[mine, None], ends[mine, None]
            query_nodes = nodes[mine].gather(1, (end - count + torch.arange(Q)).minimum(end - 1))
            real = torch.arange(Q) < count  # (rows, Q)
            output_index[query_nodes[real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += real.numel()
            self.blocks.append((send(query_nodes), send(nodes[mine, :K])))
        self.output_index = send(output_index)
        self.masks: dict[tuple, list[Tensor]] = {}

    def masks_for(self, window: int | None, repeats: int, dtype: torch.dtype) -> list[Tensor]:
        """What is added to the scores of each block, (rows, 1, repeats * Q, K): 0 where a key is seen, else -inf.
        The same tensors for all layers of a kind, since autograd keeps them."""
        key = window, repeats, dtype
        if key not in self.masks:
            self.masks[key] = []
            for query_nodes, key_nodes in self.blocks:
                column = self.columns[query_nodes][:, :, None]  # (rows, Q, 1)
                t = torch.arange(key_nodes.size(1), device=column.device)  # the column of each key
                seen = self.is_key[key_nodes][:, None] & (t <= column)  # (rows, Q, K)
                if window is not None:
                    seen &= t > column - window
                mask = torch.zeros(seen.shape, dtype=dtype, device=t.device).masked_fill(~seen, -torch.inf)
                self.masks[key].append(mask.repeat(1, repeats, 1)[:, None])
        return self.masks[key]


@torch.compiler.disable  # for the same reason
def tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, unused_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention, the only place where tokens meet: the queries of a row over the keys of its path.

    Args:
        query (1, heads, N, D), key, value (1, KV heads, N, D): grouped heads as in arXiv:2305.13245.
        options: the layer's, and `tree`, a PrefixTree; without one this is transformers' sdpa. `sliding_window`:
            columns that a query sees, its own included. Padding too far from the content sees none: zeros.

    Returns (1, N, heads, D), and None for the attention weights.
    """
    tree = options.pop("tree", None)
    if tree is None:
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, unused_mask, **options)
    # Qwen2-MoE passes no window; a full layer of EXAONE 4 passes None, whatever its module holds.
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    settings = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (N, [KV] heads, D)
    heads, kv_heads, outputs = query.size(1), key.size(1), []
    masks = tree.masks_for(window, heads // kv_heads, query.dtype)
    for (query_nodes, key_nodes), mask in zip(tree.blocks, masks):
        rows, gathered = len(query_nodes), ((query, query_nodes), (key, key_nodes), (value, key_nodes))
        q, k, v = (
            x.index_select(0, i.flatten()).view(rows, -1, *x.shape[1:]).transpose(1, 2) for x, i in gathered
        )
        # Few kernels support a mask with grouped heads: the query heads of a KV head become more queries.
        q = q.reshape(rows, kv_heads, -1, q.size(3))
        x = F.scaled_dot_product_attention(q, k, v, mask, **settings)
        outputs.append(x.reshape(rows, heads, -1, v.size(3)).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, tree.output_index)[None], None


transformers.AttentionInterface.register(TREE_ATTENTION, tree_attention)
transformers.AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)  # for padded batches


def partition(model: RewardModel, zero_optimization: dict[str, Any]) -> None:
    """Partition the parameters over the ranks, as rank 0 holds them: newly initialised weights differ by rank."""
    if not dist.is_initialized():
        raise ValueError(
            "ZeRO stage 3 partitions over ranks: start with deepspeed, and init_distributed() first"
        )
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    if "LOCAL_RANK" in os.environ:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))  # where rank 0 sends to
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_optimization}
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=model.rwtransformer.dtype)
    for buffer in model.buffers():  # which it leaves where they are
        buffer.data = buffer.to(accelerator.current_device_name())
