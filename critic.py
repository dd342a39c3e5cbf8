# SPDX-License-Identifier: MIT
# The reward/critic model of RLHF, modelled on DeepSpeed-Chat's `create_critic_model` and `RewardModel`.
"""A pretrained decoder with a linear value head: trained on pairs, then PPO's critic and reward model.

Chapter 1 is the whole model on a padded batch, and its checkpoints. Chapter 2 is the prefix tree, and ZeRO-3.
Letters in the shape comments: B pairs; R rows (2B in training: B chosen, then B rejected); T columns of the
input; E columns whose reward is needed; H hidden size; N nodes of the prefix tree; Q queries and K keys of a
row; D head size.
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

# Process-wide: cuDNN's attention gives NaN gradients on Hopper with an explicit mask (pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)


# ---- Chapter 1: the reward model on a padded batch ----


def align(
    input_ids: Tensor, attention_mask: Tensor | None, pad_id: int, num_padding_at_beginning: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the content of each row to column 0, so that left, right and interior padding become one case.

    With a mask, content is where the mask is 1. Without one, content runs from the first to the last id that
    is not PAD, plus the `num_padding_at_beginning` ids before: OPT starts every text with BOS, which has
    PAD's id once pad = eos is set (DeepSpeedExamples #455).

    Args: input_ids, attention_mask (R, T), on any device. pad_id: PAD's id.

    Returns, on the CPU:
        ids (R, T): content, then PAD. is_key (R, T): whether attention may see the token; all True without a
        mask, as in DeepSpeed-Chat. source (R, T): its column in input_ids. length (R,): content tokens.
    """
    mask_shape = (input_ids if attention_mask is None else attention_mask).shape
    if input_ids.dim() != 2 or not input_ids.numel() or mask_shape != input_ids.shape:
        shapes = f"input_ids has shape {tuple(input_ids.shape)}, attention_mask {tuple(mask_shape)}"
        raise ValueError(f"{shapes}: pass (rows, tokens) for both")
    ids, n, t = input_ids.cpu().long(), num_padding_at_beginning, torch.arange(input_ids.size(1))
    if attention_mask is not None:
        content = attention_mask.cpu().bool()  # (R, T)
    else:
        is_text = F.pad((ids != pad_id).long(), (0, n))  # (R, T + n), so that `begun` looks n columns ahead
        begun, not_over = is_text.cumsum(1)[:, n:], is_text.flip(1).cumsum(1).flip(1)[:, : len(t)]
        content = (begun > 0) & (not_over > 0)
    length = content.sum(1)
    if not length.all():
        raise ValueError(f"row {length.argmin()} of input_ids is only padding: drop the row, or its pair")
    source = (~content).int().argsort(dim=1, stable=True)  # content first, in its order
    inside = t < length[:, None]
    ids = ids.gather(1, source).masked_fill(~inside, pad_id)
    if ids.min() < 0:
        raise ValueError("input_ids has ids below 0 in its content: pass token ids, not labels")
    return ids, torch.ones_like(inside) if attention_mask is None else inside, source, length


def ranking_loss(rewards: Tensor, length: Tensor, divergence: Tensor, loss_on: str) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss of B pairs, `-log sigmoid(chosen - rejected)`. Returns loss (), end scores
    (2B,).

    "tokens" averages the loss over the positions [p, e), from the divergence p to the end e of the longer
    row, as DeepSpeed-Chat does; padding of the shorter row is included (DeepSpeedExamples #316). "end"
    compares the end scores only, as InstructGPT does (arXiv:2203.02155). A pair of identical texts gives log
    2 and no gradient.

    Args: rewards (2B, E), aligned at column 0. length (2B,). divergence (B,): p, or e where the texts are
        identical.
    """
    end_scores = rewards.gather(1, length[:, None] - 1).squeeze(1)  # (2B,)
    p, e = divergence[:, None], torch.maximum(*length.chunk(2))[:, None]  # (B, 1)
    t = torch.arange(rewards.size(1), device=rewards.device)
    if loss_on == "end":
        rewards, t = end_scores[:, None], e - 1  # one position per pair, its last
    chosen, rejected = rewards.chunk(2)  # (B, E) or (B, 1)
    difference = (chosen - rejected).masked_fill(t < p, 0)  # identical texts give 0 despite dropout
    counted = (t >= torch.minimum(p, e - 1)) & (t < e)  # of identical texts, the last position
    loss = torch.where(counted, -F.logsigmoid(difference), 0)
    loss = loss.sum(1, dtype=torch.float32) / counted.sum(1)  # (B,); a sum in fp16 could overflow
    return loss.mean().to(rewards.dtype), end_scores


class ValueHead(nn.Linear):
    """`nn.Linear(H, 1, bias=False)`, optionally in float32: above 4, bf16 has steps of 0.03, so that scores
    tie. The cast is in the module's own forward, because ZeRO-3 gathers the weight only there."""

    in_float32 = False

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.in_float32:
            return super().forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """A decoder with a value head: r(t), one scalar per token. Names and state dict match DeepSpeed-Chat's.

    Args:
        base_model: the decoder without its language-model head, as AutoModel returns it.
        tokenizer: only its pad_token_id is used, which should not be EOS.
        num_padding_at_beginning: leading PAD ids of every text: 1 for OPT with pad = eos and no mask, else 0.
        compute_fp32_loss: compute value head and loss in float32.

    Attributes: loss_on: "tokens" (default) or "end". share_prefix: False turns the prefix tree off.
    """

    prepare_inputs_for_generation = None  # PEFT reads it with task_type="CAUSAL_LM"

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
            raise ValueError("the tokenizer has no pad_token_id: set tokenizer.pad_token, but not to EOS")
        check_decoder(self.config, name)
        if isinstance(base_model, PreTrainedModel) and base_model.base_model is not base_model:
            raise ValueError(f"{name} has a head: pass its base_model, or load it with AutoModel")
        self.PAD_ID = tokenizer.pad_token_id
        self.num_padding_at_beginning = num_padding_at_beginning
        self.loss_on, self.share_prefix = "tokens", True
        self.rwtransformer = base_model
        width = getattr(self.config, "word_embed_proj_dim", self.config.hidden_size)  # OPT-350m's is narrower
        place = {"dtype": base_model.dtype, "device": base_model.device}
        self.v_head = ValueHead(width, 1, bias=False, **place)
        self.v_head.in_float32 = compute_fp32_loss
        # Its device is the model's: with ZeRO-3 offload the parameters are on the CPU.
        self.register_buffer("on_device", torch.empty(0, **place), persistent=False)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **others: Any) -> None:
        # Reentrant checkpointing drops all gradients if the embeddings are frozen.
        options = gradient_checkpointing_kwargs or {"use_reentrant": False}
        self.rwtransformer.gradient_checkpointing_enable(options, **others)

    def __getattr__(self, name: str) -> Any:
        # activation_checkpointing_enable, transformers 6's name, and the methods that turn it off.
        return getattr(self.rwtransformer, name) if "_checkpointing_" in name else super().__getattr__(name)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **others: None
    ) -> dict[str, Tensor]:
        """The ranking loss of B pairs, however the rows are padded.

        Args:
            input_ids (2B, T): chosen rows, then the rejected ones in the same order. Keep it on the CPU: the
                model sends what it needs, and reads nothing back from its device.
            attention_mask (2B, T): 1 at content. If None, PAD ids are padding, but attention sees them.
            others: what trainers pass by themselves is ignored; the rest must be None or False.

        Returns loss (), and the end scores chosen_mean_scores and rejected_mean_scores (B,), with gradients.

        Raises ValueError: the message names the argument or row, and the fix.
        """
        if self.loss_on not in ("tokens", "end"):
            raise ValueError(f"loss_on is {self.loss_on!r}: use 'tokens' or 'end'")
        ids, is_key, _, length = self._align(input_ids, attention_mask, others)  # (2B, T), ..., (2B,)
        if len(ids) % 2:
            raise ValueError(f"input_ids has {len(ids)} rows: pass B chosen rows, then the B rejected ones")
        shorter, longer = torch.aminmax(torch.stack(length.chunk(2)), dim=0)  # (B,)
        chosen, rejected = ids.chunk(2)  # (B, T)
        same = (chosen == rejected) & (torch.arange(ids.size(1)) < shorter[:, None])
        divergence = same.int().cumprod(1).sum(1)  # (B,); e where the texts are identical
        needed = longer.repeat(2) if self.loss_on == "tokens" else length  # (2B,)
        rewards = self._rewards(ids, is_key, needed)  # (2B, E)
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
        """One value per token of R rows, for PPO's critic and the frozen reward model.

        Args:
            input_ids, attention_mask (R, T): as in `forward`; PPO pads prompts left, responses right.
            prompt_length: kept from DeepSpeed-Chat, not used; must be in 2 to T unless `return_value_only`.

        Returns values (R, T), 0 at padding. Unless `return_value_only`, a dict of `values` and
        `chosen_end_scores` (R,), the rewards at each row's last content token.

        Raises ValueError: the message names the argument or row, and the fix.
        """
        ids, is_key, source, length = self._align(input_ids, attention_mask, others)
        if not return_value_only and not 1 < prompt_length <= ids.size(1):
            raise ValueError(f"prompt_length is {prompt_length}: it must be in 2 to {ids.size(1)}")
        rewards = self._rewards(ids, is_key, length)  # (R, E)
        last, source = self._send(length[:, None] - 1), self._send(source[:, : rewards.size(1)])
        content = torch.arange(rewards.size(1), device=rewards.device) <= last
        values = rewards.new_zeros(ids.shape).scatter(1, source, rewards.where(content, 0))
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": rewards.gather(1, last).squeeze(1)}

    def _align(self, input_ids: Tensor, attention_mask: Tensor | None, others: dict) -> tuple[Tensor, ...]:
        ignored = "return_dict", "num_items_in_batch"
        if given := [k for k, x in others.items() if x is not None and x is not False and k not in ignored]:
            raise ValueError(f"{', '.join(given)}: not supported, leave it out")
        return align(input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning)

    def _rewards(self, ids: Tensor, is_key: Tensor, needed: Tensor) -> Tensor:
        """r(t) for the first needed[i] tokens of aligned row i: (R, E) with E = max(needed)."""
        E = int(needed.max())
        ids, is_key = ids[:, :E], is_key[:, :E]
        if self.share_prefix and tree_is_exact(self.rwtransformer):
            return tree_rewards(self, ids, is_key, needed)
        inputs = {"input_ids": self._send(ids), "attention_mask": self._send(is_key.long())}
        return self.v_head(self.rwtransformer(**inputs, use_cache=False)[0]).squeeze(-1)

    def _send(self, x: Tensor) -> Tensor:
        """Copy to the model's device, from pinned memory, so that the copy does not block."""
        return (x.pin_memory() if self.on_device.is_cuda else x).to(self.on_device.device, non_blocking=True)


def check_decoder(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError unless the config is that of a causal text decoder."""
    if not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{name} is multimodal: pass its text decoder, such as model.language_model")
    encoders = transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    is_encoder = config.is_encoder_decoder or any(type(config) in mapping for mapping in encoders)
    is_text = hasattr(config, "vocab_size") and type(config) in transformers.MODEL_MAPPING
    bidirectional = getattr(config, "use_bidirectional_attention", None)  # Gemma's "vision" keeps text causal
    bidirectional = (
        bidirectional not in (None, False, "vision") or getattr(config, "is_causal", True) is False
    )
    if is_encoder or bidirectional or not is_text:
        raise ValueError(f"{name} is a {config.model_type} model: a critic needs a causal decoder")


def reward_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' `...ForSequenceClassification` of a family, built here if it has none."""
    hf_class = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if hf_class is None:
        decoder = transformers.MODEL_MAPPING[type(config)]
        base = decoder.__base__  # GranitePreTrainedModel, ...
        name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
        # transformers reads the `__module__` of a class when it looks for experts.
        parts = {"__module__": base.__module__, "base_model_prefix": decoder.base_model_prefix or "model"}
        hf_class = type(name, (GenericForSequenceClassification, base), parts)
        warnings.warn(f"transformers has no {name}: only create_critic_model can load the saved critic")
    return hf_class


def load_weights(path: str, config: PretrainedConfig, dtype: torch.dtype, trained: bool) -> PreTrainedModel:
    """Load backbone and head together, memory-mapped, without initialising weights that the file provides.
    `trained`: a reward checkpoint, all of whose keys must match; else a base model without a head."""
    hf_class = reward_class(config)
    prefix = hf_class.base_model_prefix
    # The head, called `score` here, in DeepSpeed-Chat, OpenRLHF, UltraRM and Eurus, and Beaver.
    heads = f"v_head|value_head|regression_head|score_head|{getattr(config, 'value_head_prefix', 'v_head')}"
    key_mapping = {
        r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": f"{prefix}.",  # of a multimodal model
        r"^rwtra(?:nsformer|nrsformer)\.": f"{prefix}.",  # DeepSpeed-Chat's name, and its older spelling
        rf"^(?:{heads})\.": "score.",
        rf"^(?!{prefix}\.|score\.)(.+)": rf"{prefix}.\1",  # a bare decoder
    }

    def init(self, config: PretrainedConfig) -> None:
        hf_class.__init__(self, config)
        # `key_mapping` already adds the prefix; transformers 4.57 would add it again to some keys.
        self.base_model_prefix = ""

    Loader = type(hf_class.__name__, (hf_class,), {"__init__": init, "__module__": hf_class.__module__})
    options = {"key_mapping": key_mapping, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = Loader.from_pretrained(path, config=config, dtype=dtype, **options)
    except Exception as error:  # each format raises its own type
        raise ValueError(
            f"the weights in {path} cannot be read, try to download them again: {error}"
        ) from error
    model.base_model_prefix = prefix
    kinds = "missing", "unexpected", "mismatched"
    check_keys(path, trained, {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in kinds})
    return model


def check_keys(path: str, trained: bool, found: dict[str, list[str]]) -> None:
    # Old versions of transformers saved causal masks with GPT-2, GPT-J, GPT-Neo and GPT-BigCode: not weights.
    masks = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")
    surplus = [key for key in found["unexpected"] if not masks.search(key)]
    no_head, found["unexpected"] = "score.weight" in found["missing"], surplus
    if not trained:  # other weights of a base model are ignored: a vision tower, the language model's head
        found = {kind: [key for key in keys if "score.weight" not in key] for kind, keys in found.items()}
        found["unexpected"] = []
        if not no_head:
            warnings.warn(f"the value head of {path} is reinitialised; rlhf_training=True keeps it")
    hint = "download them again"
    if trained and any(key.startswith("score.") for key in surplus):
        hint = "the head (score) must have one output and no bias: this one cannot be loaded"
    elif trained and no_head:
        hint = "it looks like a base model: train it first (rlhf_training=False)"
        if not all(re.search("lm_head|embed_out", key) for key in surplus):
            hint = "if one of these is the head, rename its key to score.weight, one row"
    if problems := "; ".join(f"{kind} {', '.join(keys[:5])}" for kind, keys in found.items() if keys):
        raise ValueError(f"the weights in {path} do not match the model: {problems}; {hint}")


def override_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Set every dropout probability of a config, nested ones too: `dropout`, `resid_pdrop`, ..."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and less than 1")
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            override_dropout(value, dropout)
        elif re.search("dropout|pdrop$", name) and type(value) in (int, float):
            vars(config)[name] = dropout or type(value)(0)  # bypasses validation: MPT's must be an int


def read_config(path: str, dropout: float | None) -> PretrainedConfig:
    if Path(path, "adapter_config.json").exists():
        raise ValueError(f"{path} is a PEFT adapter: merge it (merge_and_unload), then save_critic_model")
    if any(Path(path).glob("*model_states.pt")):
        raise ValueError(f"{path} is a DeepSpeed checkpoint: pass the folder that save_critic_model wrote")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # else custom code prompts
    if not config.is_encoder_decoder:
        config = config.get_text_config(decoder=True)  # of a multimodal model, its text decoder
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
            (`rwtransformer.*`, `v_head.weight`), or a transformers `AutoModelForSequenceClassification` with
            one label, which TRL and OpenRLHF write too; safetensors or pickle, complete or sharded.
        tokenizer: with a pad_token_id. If it has more tokens than a base model, the embeddings grow to its
            length, rounded up to a multiple of 8.
        ds_config: the DeepSpeed config; bf16 or fp16 sets the dtype (else float32), ZeRO stage 3 partitions.
        num_padding_at_beginning, compute_fp32_loss: as in RewardModel.
        rlhf_training: load backbone and head from a reward checkpoint; else the head is newly initialised.
        dropout: in [0, 1), overrides every dropout probability of the config; None leaves them.
        zero_stage: kept from DeepSpeed-Chat; may only repeat the stage in `ds_config`.

    Raises ValueError: the message names the argument, file or key, and the fix. OSError: no such model.
    """
    ds_config, dtype = ds_config or {}, torch.float32
    for name, half in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        if (enabled := (ds_config.get(name) or {}).get("enabled", False)) not in (True, False):
            raise ValueError(f'{name} in ds_config has "enabled": {enabled!r}: write true or false')
        dtype = half if enabled else dtype
    zero = ds_config.get("zero_optimization") or {}
    if zero_stage not in (0, stage := zero.get("stage", 0)):
        raise ValueError(f"zero_stage is {zero_stage}, but ds_config has stage {stage}: leave zero_stage out")
    if stage == 3 and not dist.is_initialized():
        raise ValueError("ZeRO stage 3 partitions over ranks: launch with deepspeed, and init_distributed()")
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
    """Run on rank 0; every rank returns its result or raises its error, so that no rank hangs."""
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
    """Write the critic for transformers' `AutoModelForSequenceClassification`, TRL and vLLM.

    Every rank calls it. Under ZeRO-3 parameters are gathered one by one, and only rank 0 writes: to a staging
    directory in `output_dir`, whose files are then moved, the weights last, so that a failed save leaves an
    older critic's weights alone. `model` is a RewardModel, or the DeepSpeed engine around it.

    Raises on every rank: OSError if `output_dir` cannot be written; ValueError if the keys are not a
    critic's.
    """
    model = getattr(model, "module", model)
    config = copy.deepcopy(model.config)
    # "regression": else transformers' pipeline returns the sigmoid of the score.
    config.update({"num_labels": 1, "pad_token_id": model.PAD_ID, "problem_type": "regression"})
    with torch.device("meta"):  # a template without data, for names and config
        template = reward_class(config)(config).to(model.rwtransformer.dtype)
    names = {"rwtransformer": template.base_model_prefix, "v_head": "score"}
    parts = ((key.partition("."), value) for key, value in model.state_dict(keep_vars=True).items())
    state = {f"{names.get(first, first)}.{rest}": value for (first, _, rest), value in parts}
    if differing := sorted(state.keys() ^ template.state_dict().keys()):
        remedies = (
            ("_orig_mod", "pass model._orig_mod"),
            ("lora_", "merge the adapters first (merge_and_unload)"),
        )
        found = [remedy for part, remedy in remedies if part in str(differing)]
        what = f"{', '.join(found) or 'surplus or missing keys'}: {', '.join(differing[:4])}"
        raise ValueError(f"not saved as {type(template).__name__}: {what}")
    gather = contextlib.nullcontext  # does nothing
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
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else one set after loading is lost
        tokenizer.save_pretrained(staging)
        new = sorted(os.listdir(staging), key=lambda name: (".safetensors" in name, name))
        for name in new:
            shutil.rmtree(final / name, ignore_errors=True)  # a directory of chat templates
            os.replace(staging / name, final / name)
        # Remove an earlier model's files, since loaders might read them.
        older = r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?|(chat|added|special)_\w+\.\w+"
        for name in set(os.listdir(final)) - set(new):
            if re.fullmatch(older, name):
                (final / name).unlink()
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise OSError(f"{final} cannot be written: free space or pass another folder ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---- Chapter 2: the prefix tree, and partitioning under ZeRO-3 ----

# Families in which a test saw the same result as on a padded batch: each layer is causal attention with
# explicit position ids, full or in a window, through transformers' AttentionInterface. All others run padded
# batches, for instance BLOOM and MPT (ALiBi), GPT-Neo (local attention), Llama 4 (chunked), Qwen3-Next
# (linear), GPT-J (not through the interface), GPT-OSS (attention sinks) and Gemma 2 (soft-capped scores).
TREE_FAMILIES = (
    "afmoe apertus arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 "
    "diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text gemma3n_text "
    "gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox granite granitemoe "
    "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 "
    "jetmoe kolibri1 laguna llama longcat_flash mellum minicpm3 minimax_m2 ministral ministral3 mistral "
    "mixtral modernbert-decoder moshi nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe "
    "qwen2_vl_text qwen2_5_vl_text qwen3 qwen3_moe qwen3_vl_text qwen3_vl_moe_text seed_oss smollm3 "
    "solar_open starcoder2 youtu "
).split()
TREE_ATTENTION = "prefix_tree"  # the name of `tree_attention` in transformers' registry


def tree_is_exact(backbone: PreTrainedModel) -> bool:
    """Whether the tree gives a padded batch's results. If so, this switches the attention to the tree's."""
    config = backbone.config
    by_interface = backbone._supports_attention_backend and config._attn_implementation == "sdpa"
    if by_interface and config.model_type in TREE_FAMILIES:
        backbone.set_attn_implementation(TREE_ATTENTION)  # which is sdpa if no tree is passed
    return config._attn_implementation == TREE_ATTENTION


def tree_rewards(model: RewardModel, ids: Tensor, is_key: Tensor, needed: Tensor) -> Tensor:
    """`RewardModel._rewards` with each distinct (prefix, token) computed once."""
    tree = PrefixTree(ids, is_key, needed, model._send)
    # The backbone forwards unknown keyword arguments to its attention, which is how `tree` reaches
    # `tree_attention`. A 4-D mask stops the backbone from building one of its own. This mask is a
    # placeholder: its integers make sdpa raise if a backbone loses `tree`.
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.long, device=tree.ids.device)
    position_ids = tree.columns
    if model.config.model_type == "opt":  # transformers' OPT gives masked padding position -1
        position_ids = position_ids.where(tree.is_key, -1)
    inputs = {"input_ids": tree.ids[None], "position_ids": position_ids[None], "attention_mask": placeholder}
    hidden = model.rwtransformer(**inputs, tree=tree, use_cache=False)[0]  # (1, N, H)
    return model.v_head(hidden).flatten()[tree.node_index]  # (R, E)


def block_labels(queries: Tensor, keys: Tensor, device: torch.device) -> Tensor:
    """The label of each row, one or two numbers, from its counts of queries and keys. Rows with equal labels
    form a block, and share one sdpa call.

    On a CPU padding costs more than calls: both counts differ by less than 64 within a block. On an
    accelerator calls cost more: one block up to 8192 padded queries, else two, split at half the largest Q.
    """
    if device.type == "cpu":
        return torch.stack([queries, keys], 1).add(63) // 64
    longest = queries.max()
    return ((2 * queries > longest) & (len(queries) * longest > 8192)).long()[:, None]


class PrefixTree:
    """Each distinct (prefix, token) of a batch, once: all that a causal model has to compute.

    In its row, a token's hidden state depends on the token itself and on those before it, and on nothing
    else. So rows with a common prefix share the states of the prefix. Sorted, such rows are neighbours. The
    tokens of a row from its first difference to the row above are new; the new tokens of all rows are the N
    nodes:

        rows    P Q a b      new    P Q a b      nodes, N = 7    P Q a b c d R
                P Q a c d           . . . c d    columns         0 1 2 3 3 4 1
                P R                 . R

    Args:
        ids, is_key (R, E): as from `align`. needed (R,): how many tokens of each row are needed; with the
            "tokens" loss they include padding of the shorter row. send: moves a tensor to the model's device.

    Attributes:
        ids, columns, is_key (N,): the packed sequence; the column of each node in its row, which is its
            position id and bounds what it sees; whether any node may see it.
        node_index (R, E): the node of each token, for reading rewards back; arbitrary beyond `needed`.
        blocks: for each group of distinct rows, two tensors of node numbers: query_nodes (rows, Q), the new
            nodes of each row; key_nodes (rows, K), all its nodes up to the last visible one. Shorter rows are
            padded: with their last query, and with keys that the mask hides.
        output_index (N,): where the output of each node stands in the concatenated outputs of the blocks.
        masks: the cache of `masks_for`.
    """

    @torch.compiler.disable  # its shapes differ from batch to batch
    def __init__(self, ids: Tensor, is_key: Tensor, needed: Tensor, send: Callable[[Tensor], Tensor]) -> None:
        t = torch.arange(ids.size(1))
        # Equal prefixes merge; a hidden and a visible copy of an id differ. -2 marks what is not needed. It
        # sorts first: a row comes before the rows that extend it, so that each distinct row has a new token.
        merge_key = (2 * ids + is_key).masked_fill(t >= needed[:, None], -2)  # (R, E)
        rows, row_of = torch.unique(merge_key, dim=0, return_inverse=True)  # (rows, E), distinct; (R,)
        differs = F.pad(rows[1:] != rows[:-1], (0, 0, 1, 0), value=True)  # all of the first row is new
        new = (differs.cumsum(1) > 0) & (rows >= 0)
        # Nodes are numbered row by row. Where a column is not new, the row has the node of the row above.
        nodes = torch.where(new, new.flatten().cumsum(0).view_as(new) - 1, 0).cummax(0).values
        self.node_index = send(nodes[row_of])
        self.ids, self.is_key = send(rows[new] // 2), send(rows[new] % 2 == 1)
        self.columns = send(t.expand_as(rows)[new])

        # Counts (rows,); hidden keys come last, and so can be cut off.
        queries, keys, lengths = new.sum(1), (rows % 2).sum(1), (rows >= 0).sum(1)
        block = torch.unique(block_labels(queries, keys, self.ids.device), dim=0, return_inverse=True)[1]
        self.blocks, output_index, offset = [], torch.empty(len(self.ids), dtype=torch.long), 0
        nodes = F.pad(nodes, (0, 7))  # Q and K are multiples of 8, for the kernels
        for in_block in (block == number for number in range(block.max() + 1)):
            Q, K = (x[in_block].max().add(7).item() // 8 * 8 for x in (queries, keys))
            count, length = queries[in_block, None], lengths[in_block, None]
            query_nodes = nodes[in_block].gather(1, (length - count + torch.arange(Q)).minimum(length - 1))
            real = torch.arange(Q) < count  # (rows, Q)
            output_index[query_nodes[real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += real.numel()
            self.blocks.append((send(query_nodes), send(nodes[in_block, :K])))
        self.output_index = send(output_index)
        self.masks: dict[tuple, list[Tensor]] = {}

    def masks_for(self, window: int | None, repeats: int, dtype: torch.dtype) -> list[Tensor]:
        """For each block what is added to the scores, (rows, 1, repeats * Q, K): 0 where a key is seen, else
        -inf. `repeats`: query heads per KV head. Cached, else autograd keeps a copy per layer."""
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


@torch.compiler.disable  # its shapes differ from batch to batch
def tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention, the only operation that mixes tokens: queries are a row's new nodes, keys all its nodes.

    Args:
        query (1, heads, N, D), key, value (1, KV heads, N, D): grouped heads as in arXiv:2305.13245.
        options: the layer's options plus `tree`, a PrefixTree; without one this is transformers' sdpa.
            `sliding_window`: columns that a query sees, its own included.

    Returns (1, N, heads, D), D being that of value, and None for the attention weights. A query that sees no
    key gets 0.
    """
    tree = options.pop("tree", None)
    if tree is None:
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    # sliding_window=None: full attention (EXAONE 4). No such option: the module's window (Qwen2-MoE).
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    settings = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (N, [KV] heads, D)
    heads, kv_heads, outputs = query.size(1), key.size(1), []
    masks = tree.masks_for(window, heads // kv_heads, query.dtype)
    for (query_nodes, key_nodes), mask in zip(tree.blocks, masks):
        rows, wanted = len(query_nodes), ((query, query_nodes), (key, key_nodes), (value, key_nodes))
        q, k, v = (x.index_select(0, i.flatten()).unflatten(0, i.shape).transpose(1, 2) for x, i in wanted)
        # Few kernels support a mask with grouped heads, so the query heads of a KV head become more queries.
        q = q.reshape(rows, kv_heads, -1, q.size(3))
        x = F.scaled_dot_product_attention(q, k, v, mask, **settings)
        outputs.append(x.reshape(rows, heads, -1, v.size(3)).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, tree.output_index)[None], None


transformers.AttentionInterface.register(TREE_ATTENTION, tree_attention)
transformers.AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)  # of padded batches


def partition(model: RewardModel, zero_optimization: dict[str, Any]) -> None:
    """Partition rank 0's parameters over the ranks; newly initialised weights differ from rank to rank."""
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    if "LOCAL_RANK" in os.environ:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))  # which receives rank 0's broadcast
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_optimization}
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=model.rwtransformer.dtype)
    for buffer in model.buffers():  # zero.Init does not move them
        buffer.data = buffer.to(accelerator.current_device_name())
