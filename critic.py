# SPDX-License-Identifier: MIT
"""The reward/critic model of RLHF: a pretrained decoder with a linear value head.

Modelled on DeepSpeed-Chat's (github.com/deepspeedai/DeepSpeedExamples). Three chapters:

1. The reward model on a padded batch: alignment, ranking loss, value head. Complete by itself.
2. Checkpoints and ranks: create, load, save, ZeRO.
3. The prefix tree, which computes shared prefixes once. Lines of chapter 1 that end in
   "# chapter 3" hand over to it: delete them with the chapter, and the model is still correct.

Shapes: B pairs; R rows (2B in training: B chosen, then B rejected); T columns of the input;
E columns of the longest row whose rewards are needed; H hidden size. In chapter 3 also: U distinct
rows; N nodes; Q queries; K keys; D head size.
"""

import copy
import functools
import math
import pickle
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification

# ---- Chapter 1: the reward model on a padded batch ----

# All sdpa kernels but cuDNN's, which returns NaN gradients on Hopper with an explicit mask
# (pytorch#196678).
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def align(
    input_ids: Tensor, attention_mask: Tensor | None, pad_id: int, num_padding_at_beginning: int = 0
) -> tuple[Tensor, ...]:
    """Move the content of each row to column 0, so that all kinds of padding become one.

    Content is where the mask is 1. Without a mask, it runs from the first to the last id that is
    not PAD, plus the `num_padding_at_beginning` ids before it: OPT starts every text with BOS, and
    once pad = eos is set, this BOS has PAD's id (DeepSpeedExamples #455).

    Returns, on the CPU:
        ids: (R, T), content, then PAD.
        visible: (R, T), what attention may see: content; without a mask everything, as in
            DeepSpeed-Chat.
        source: (R, T), the column of each id in input_ids.
        length: (R,), content tokens.
    """
    ids = input_ids.cpu().long()
    content = ids != pad_id if attention_mask is None else attention_mask.cpu().bool()
    if ids.dim() != 2 or not ids.numel() or content.shape != ids.shape:
        shapes = f"input_ids {tuple(ids.shape)}, mask {tuple(content.shape)}"
        raise ValueError(f"{shapes}: pass (rows, tokens) for both")
    empty = ~content.any(1)  # (R,)
    if empty.any():
        row = int(empty.int().argmax())
        raise ValueError(f"row {row} of input_ids is only padding: drop the row, or its pair")
    t = torch.arange(ids.size(1), device=ids.device)
    if attention_mask is None:
        first = content.int().argmax(1) - num_padding_at_beginning
        last = (content * t).argmax(1)
        content = (t >= first[:, None]) & (t <= last[:, None])
    length = content.sum(1)
    source = (~content).int().argsort(dim=1, stable=True)  # content first, in its order
    inside = t < length[:, None]
    visible = torch.ones_like(inside) if attention_mask is None else inside
    return ids.gather(1, source).where(inside, pad_id), visible, source, length


def ranking_loss(
    rewards: Tensor, length: Tensor, divergence: Tensor, loss_on: str
) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss of B pairs, `-log sigmoid(chosen - rejected)`, and end scores (2B,).

    "tokens" averages it over the positions [p, e), from the divergence p to the end e of the longer
    row, as DeepSpeed-Chat does, with padding of the shorter row (DeepSpeedExamples #316). "end"
    compares end scores (InstructGPT, arXiv:2203.02155). Identical texts, where p = e, give log 2
    and no gradient.

    Args: rewards (2B, E), aligned at column 0; length (2B,), content tokens; divergence (B,), p.
    """
    end_scores = rewards.gather(1, length[:, None] - 1).squeeze(1)  # (2B,)
    end = torch.maximum(*length.chunk(2))  # (B,)
    if loss_on == "end":
        chosen, rejected = end_scores.chunk(2)  # (B,)
        loss = -F.logsigmoid(chosen - rejected)
    else:
        chosen, rejected = rewards.chunk(2)  # (B, E)
        t = torch.arange(rewards.size(1), device=rewards.device)
        counted = (t >= divergence[:, None]) & (t < end[:, None])  # (B, E)
        per_token = -F.logsigmoid(chosen - rejected).where(counted, 0)
        # In float32, because a sum in fp16 could overflow.
        loss = per_token.sum(1, dtype=torch.float32) / counted.sum(1).clamp(min=1)
    loss = loss.where(divergence < end, math.log(2))  # (B,)
    return loss.mean().to(rewards.dtype), end_scores


class Float32Linear(nn.Linear):
    """A head that computes in float32, whatever the dtype of its weight.

    bf16 has steps of 0.03 above 4, so that scores tie (sentence-transformers #3894).
    """

    def forward(self, hidden: Tensor) -> Tensor:
        # The cast is in forward, because ZeRO-3 gathers the weight only there.
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """A decoder with a value head: r(t), one scalar per token. Names are DeepSpeed-Chat's.

    It is in the mode of `base_model`: eval after `from_pretrained`, so call `.train()` to train.

    Args:
        base_model: the decoder without its language-model head, as AutoModel returns it.
        tokenizer: its pad_token_id should not be EOS, and must have an embedding.
        num_padding_at_beginning: how many PAD ids begin every text, used where no mask is passed:
            1 for OPT with pad = eos.
        compute_fp32_loss: compute the value head and the loss in float32.
        loss_on: "tokens", a loss at every response token, or "end", at the last (`ranking_loss`).
        share_prefix: compute shared prefixes once, where that is exact (chapter 3). This sets
            base_model's attention to "prefix_tree", which calls sdpa where it gets no tree.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: Tokenizer,
        num_padding_at_beginning: int = 0,
        compute_fp32_loss: bool = False,
        loss_on: str = "tokens",
        share_prefix: bool = True,
    ) -> None:
        super().__init__()
        config = base_model.config
        name = type(base_model).__name__
        check_decoder(config, name)
        if base_model.get_output_embeddings() is not None:
            raise ValueError(f"{name} has a head: pass its base_model, or load it with AutoModel")
        if loss_on not in ("tokens", "end"):
            raise ValueError(f"loss_on is {loss_on!r}: use 'tokens' or 'end'")
        self.PAD_ID = tokenizer.pad_token_id
        if self.PAD_ID is None or self.PAD_ID >= config.vocab_size:
            fix = "set tokenizer.pad_token, call base_model.resize_token_embeddings(len(tokenizer))"
            raise ValueError(f"pad_token_id {self.PAD_ID} of {config.vocab_size} embeddings: {fix}")
        self.config = config
        self.num_padding_at_beginning = num_padding_at_beginning
        self.loss_on = loss_on
        self.share_prefix = share_prefix and supports_tree(base_model)  # chapter 3
        if self.share_prefix:  # chapter 3
            base_model.set_attn_implementation(TREE_ATTENTION)  # chapter 3
        self.rwtransformer = base_model
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT-350m's is narrower
        place = {"dtype": base_model.dtype, "device": base_model.device}
        head = Float32Linear if compute_fp32_loss else nn.Linear
        self.v_head = head(width, 1, bias=False, **place)
        # This empty buffer moves with the model and so tells its device, also where ZeRO-3 offloads
        # the parameters to the CPU.
        self.register_buffer("on_device", torch.empty(0, **place), persistent=False)
        self.train(base_model.training)

    @property
    def device(self) -> torch.device:
        return self.on_device.device

    def get_input_embeddings(self) -> nn.Module:
        """For NEFTune, and for LoRA with recomputed activations."""
        return self.rwtransformer.get_input_embeddings()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Works like transformers' method; call this one, not base_model's.

        It turns cuDNN's attention off in the whole process, because activations are recomputed in
        the backward pass, outside of the switch in `_score`.
        """
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.rwtransformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.rwtransformer.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = True,
        use_cache: bool = False,
    ) -> dict[str, Tensor]:
        """The ranking loss of B pairs, however the rows are padded.

        Args:
            input_ids: (2B, T), B chosen rows, then the B rejected ones. Never slice this dimension
                (nn.DataParallel, accelerate's dispatch_batches): run one process per device.
            attention_mask: (2B, T), 1 at content. If None, PAD is padding, but attention sees it.
            return_loss: ignored. transformers' Trainer computes an evaluation loss only if forward
                has this argument, and True is its default.
            use_cache: ignored. DeepSpeed-Chat passes it.
        Returns loss (), and chosen_mean_scores and rejected_mean_scores (B,), which are end scores;
        the names are DeepSpeed-Chat's. Other losses can be built from them, such as Llama 2's
        margin (arXiv:2307.09288). Raises ValueError, which names the row and the fix.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError("nn.DataParallel tears pairs apart: launch one process per device")
        ids, visible, _, length = self._align(input_ids, attention_mask)  # (2B, T); length (2B,)
        if len(ids) % 2:
            raise ValueError(f"input_ids has {len(ids)} rows: pass B chosen, then the B rejected")
        chosen_ids, rejected_ids = ids.chunk(2)  # (B, T)
        shorter = torch.minimum(*length.chunk(2))  # (B,)
        longer = torch.maximum(*length.chunk(2))
        in_both = torch.arange(ids.size(1), device=ids.device) < shorter[:, None]
        same = (chosen_ids == rejected_ids) & in_both
        divergence = same.int().cumprod(1).sum(1)  # (B,); e where the texts are identical
        # The loss reads the rewards of a row's first `needed` tokens. "end" reads up to the row's
        # own end, "tokens" up to the end of the longer row: padding of the shorter one takes part.
        needed = length if self.loss_on == "end" else longer.repeat(2)  # (2B,)
        rewards = self._rewards(ids, visible, needed)  # (2B, E)
        length = self._send(length)
        loss, scores = ranking_loss(rewards, length, self._send(divergence), self.loss_on)
        chosen, rejected = scores.chunk(2)  # (B,)
        return {"loss": loss, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}

    def forward_value(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
        use_cache: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """One value per token of R rows, for PPO's critic and the frozen reward model.

        This is a second forward, which wrappers do not see. Under DDP, `ddp.module.forward_value`
        does not average gradients: wrap a module whose forward calls it. Under FSDP2, first call
        `torch.distributed.fsdp.register_fsdp_forward_method(model, "forward_value")`.

        Args: as in `forward`, but R rows. `prompt_length` and `use_cache`, which DeepSpeed-Chat
        passes, are ignored. Returns values (R, T), 0 at padding; unless return_value_only, in a
        dict with chosen_end_scores (R,).
        """
        ids, visible, source, length = self._align(input_ids, attention_mask)
        rewards = self._rewards(ids, visible, length)  # (R, E)
        E = rewards.size(1)
        last = self._send(length[:, None] - 1)
        of_content = rewards.where(torch.arange(E, device=rewards.device) <= last, 0)
        # The inverse of `align`: each reward goes back to the column that its token came from.
        values = rewards.new_zeros(ids.shape).scatter(1, self._send(source[:, :E]), of_content)
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": rewards.gather(1, last).squeeze(1)}

    def _align(self, input_ids, attention_mask):
        return align(input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning)

    def _rewards(self, ids, visible, needed):
        """r(t) for the first needed[i] tokens of aligned row i: (R, E) with E = max(needed)."""
        E = needed.max()
        ids = ids[:, :E]
        visible = visible[:, :E]
        if self.share_prefix:  # chapter 3
            return tree_rewards(self, ids, visible, needed)  # chapter 3
        return self._score(input_ids=self._send(ids), attention_mask=self._send(visible.long()))

    def _score(self, **inputs):
        with sdpa_kernel(KERNELS):
            hidden = self.rwtransformer(**inputs, use_cache=False)[0]  # (rows, columns, H)
        return self.v_head(hidden).squeeze(-1)

    def _send(self, x):
        """Copy to the model's device, without waiting for it."""
        if self.device.type == "cuda":
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)


def check_decoder(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError unless it is a text decoder, and each token sees earlier ones only."""
    kind = config.model_type
    is_language_model = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    is_text_part = kind.endswith("_text")  # of a multimodal model
    has_backbone = type(config) in transformers.MODEL_MAPPING
    is_text_only = config.get_text_config(decoder=True) is config
    is_decoder = (is_language_model or is_text_part) and has_backbone and is_text_only

    has_encoder = config.is_encoder_decoder
    fills_masks = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING  # BERT, ...
    is_bidirectional = kind in ("xlnet", "embedding_gemma2_text")
    says_not_causal = getattr(config, "is_causal", True) is False
    # Gemma's "vision" attends in both directions within images only.
    direction = getattr(config, "use_bidirectional_attention", None)
    sees_later_text = direction not in (None, False, "vision")
    is_causal = not (is_bidirectional or says_not_causal or sees_later_text)
    if has_encoder or fills_masks or not is_causal or not is_decoder:
        raise ValueError(f"{name} is a {kind} model: a critic needs a causal text decoder")


# ---- Chapter 2: checkpoints and ranks ----

# transformers partitions weights itself if a ZeRO-3 config is alive, for which it keeps a private
# global. There is no public switch, and here weights are partitioned once they are complete.
HF_DEEPSPEED_CONFIG = "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref"
UNPARTITIONED = mock.patch(HF_DEEPSPEED_CONFIG, None)
DAMAGED = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
# Files of an older critic that a loader would still read. save_pretrained removes older shards.
OLDER_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OLDER_WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
OLDER_TOKENIZER = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def create_critic_model(
    model_name_or_path: str,
    tokenizer: Tokenizer,
    ds_config: dict[str, Any] | None = None,
    num_padding_at_beginning: int = 0,
    rlhf_training: bool = False,
    dropout: float | None = None,
    zero_stage: int = 0,
    compute_fp32_loss: bool = False,
    loss_on: str = "tokens",
    share_prefix: bool = True,
    dtype: torch.dtype | None = None,
) -> RewardModel:
    """Make the critic from a pretrained decoder (step 2), or load a reward checkpoint (step 3).

    It is in eval mode, as after `from_pretrained`: call `.train()` to train it.

    Args:
        model_name_or_path: a folder or a hub id; safetensors or pickle, complete or sharded.
        tokenizer: if it has more tokens than a base model, the embeddings grow, to a multiple of 8.
        ds_config: DeepSpeed's; bf16 or fp16 sets the dtype (else float32), stage 3 partitions.
        rlhf_training: require a trained head, of DeepSpeed-Chat or of transformers'
            `AutoModelForSequenceClassification` with one label. If False, such a head is trained
            further, and a base model gets a new one; `load_report` of the result says which.
        dropout, dtype: override those of the config and of `ds_config`.
        zero_stage: DeepSpeed-Chat's, ignored: `ds_config` has the stage.
    Raises ValueError, which names the argument, file or key, and the fix; OSError without a model.
    """
    ds_config = ds_config or {}
    dtype = dtype or training_dtype(ds_config)
    config = AutoConfig.from_pretrained(model_name_or_path)
    if not config.is_encoder_decoder:
        config = config.get_text_config(decoder=True)  # of a multimodal model
    check_decoder(config, model_name_or_path)
    config.num_labels = 1
    if dropout is not None:
        set_dropout(config, dropout)
    size = len(tokenizer)
    if rlhf_training and size > config.vocab_size:
        sizes = f"the tokenizer has {size} tokens, but {model_name_or_path} {config.vocab_size}"
        raise ValueError(f"{sizes} embeddings: pass the tokenizer it was trained with")
    hf_model, has_head, report = load_weights(model_name_or_path, config, dtype, rlhf_training)
    if size > config.vocab_size:
        hf_model.resize_token_embeddings(size, pad_to_multiple_of=8, mean_resizing=False)
    options = (num_padding_at_beginning, compute_fp32_loss, loss_on, share_prefix)
    model = RewardModel(hf_model.base_model, tokenizer, *options)
    if has_head:
        model.v_head.weight = hf_model.score.weight
    model.load_report = report
    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        partition_zero3(model, ds_config)
    return model


def training_dtype(ds_config):
    """The dtype of the parameters that DeepSpeed expects."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = ds_config.get(name, {}).get("enabled", False)
        if enabled not in (True, False):  # DeepSpeed silently takes "auto" for false
            raise ValueError(f'"enabled" of {name} in ds_config is {enabled!r}: use true or false')
        if enabled:
            return dtype
    return torch.float32


def set_dropout(config, dropout):
    for name, value in vars(config).items():
        if re.search("dropout|pdrop$", name) and type(value) in (int, float):
            setattr(config, name, dropout)


def reward_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of a family, or one like it, which only create_critic_model can load."""
    hf_class = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if hf_class is not None:
        return hf_class
    decoder = transformers.MODEL_MAPPING[type(config)]
    base = decoder.__base__  # GranitePreTrainedModel, ...
    name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    warnings.warn(f"transformers has no {name}: only create_critic_model can load a saved critic")
    prefix = decoder.base_model_prefix or "model"
    parts = {"__module__": base.__module__, "base_model_prefix": prefix}
    return type(name, (GenericForSequenceClassification, base), parts)


def load_weights(path, config, dtype, needs_head):
    """Returns transformers' reward model, whether the checkpoint had its head, and a report."""
    hf_class = reward_class(config)
    prefix = hf_class.base_model_prefix
    openrlhf = getattr(config, "value_head_prefix", "score")
    key_mapping = {
        # A multimodal model's text decoder: model.language_model.layers... -> model.layers...
        r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": f"{prefix}.",
        # DeepSpeed-Chat's, in both spellings: rwtranrsformer.layers... -> model.layers...
        r"^rwtra(?:nsformer|nrsformer)\.": f"{prefix}.",
        # Heads of DeepSpeed-Chat (v), OpenRLHF (value), UltraRM (regression) and Beaver (score):
        # v_head.weight -> score.weight
        rf"^({openrlhf}|(v|value|regression|score)_head)\.(?=(weight|bias)$)": "score.",
        # A bare decoder: layers... -> model.layers...
        rf"^(?!{prefix}\.|score\.)(.+)": rf"{prefix}.\1",
    }
    options = {"config": config, "dtype": dtype, "key_mapping": key_mapping}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with UNPARTITIONED:
            model, info = hf_class.from_pretrained(path, **options)
    except DAMAGED as error:
        raise ValueError(f"{damaged_file(path)}: {error}; if damaged, download it again") from error
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    unused = set(info["unexpected_keys"])
    wrong = mismatched | set(info["missing_keys"])
    has_head = "score.weight" not in wrong
    if needs_head:
        wrong |= unused  # it may be the head, under another name
    else:  # a new head; a vision tower or the language model's head may be unused
        wrong -= {"score.weight"}
        unused |= mismatched & {"score.weight"}
    if wrong:
        keys = f"missing, unexpected or mis-shaped are {sorted(wrong)[:5]}"
        fix = "download it again, or run step 2: a head is score.weight, (1, H), without bias"
        raise ValueError(f"{path} does not match its config.json: {keys}; {fix}")
    head = "from the checkpoint" if has_head else "newly initialised"
    names = sorted(key.removeprefix(f"{prefix}.") for key in unused)
    report = f"value head: {head}; weights that are not used: {len(names)} {names[:5]}"
    return model, has_head, report


def damaged_file(path):
    """The first safetensors file of a folder that does not open, else the folder itself."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            safe_open(file, "pt")
        except DAMAGED:
            return file
    return path


def save_critic_model(model: nn.Module, tokenizer: Tokenizer, output_dir: str | Path) -> None:
    """Write the critic for transformers' `AutoModelForSequenceClassification`, TRL and vLLM.

    Every rank calls it, with a RewardModel or the DeepSpeed engine around it. A killed save leaves
    a folder that does not load. Raises RuntimeError, before it writes, if names or shapes differ.
    """
    model = getattr(model, "module", model)
    if model.PAD_ID == tokenizer.eos_token_id:
        fix = 'tokenizer.add_special_tokens({"pad_token": "[PAD]"}) before create_critic_model'
        warnings.warn(f"PAD is EOS, so that transformers scores the token before EOS: call {fix}")
    state = model.state_dict(keep_vars=True)
    folder = Path(output_dir)
    if dist.is_initialized():
        state = gather_on_rank_0(state)  # collective: every rank
        on_rank_0(write_folder, folder, model, tokenizer, state)
    else:
        write_folder(folder, model, tokenizer, state)


def write_folder(folder, model, tokenizer, state):
    """Replace the critic in a folder. Without weights it does not load, so they come last."""
    config = copy.deepcopy(model.config)
    # "regression": else transformers' pipeline returns the sigmoid of the score.
    config.update({"num_labels": 1, "pad_token_id": model.PAD_ID, "problem_type": "regression"})
    with torch.device("meta"), UNPARTITIONED:
        hf_model = reward_class(config)(config)
    prefix = hf_model.base_model_prefix
    renamed = {}
    for key, value in state.items():
        renamed[key.replace("rwtransformer", prefix).replace("v_head.", "score.")] = value
    try:
        hf_model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:  # it lists the names
        error.add_note("call merge_and_unload, unwrap _orig_mod, or use FSDP1's summon_full_params")
        raise
    folder.mkdir(parents=True, exist_ok=True)
    for name in OLDER_WEIGHTS + OLDER_TOKENIZER:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else only that of loading
    tokenizer.save_pretrained(folder)
    hf_model.save_pretrained(folder)


def partition_zero3(model, ds_config):
    """Broadcast rank 0's parameters, since new weights differ between ranks, and partition them."""
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    accelerator.set_device(dist.get_node_local_rank())  # which receives rank 0's broadcast
    zero = ds_config["zero_optimization"]
    settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=model.rwtransformer.dtype)
    for buffer in model.buffers():  # zero.Init does not move them
        buffer.data = buffer.to(accelerator.current_device_name())


def gather_on_rank_0(state):
    """Copy a state dict to rank 0's CPU, one whole tensor after the other. Every rank calls it."""
    gathered = {}
    for key, value in state.items():
        if hasattr(value, "ds_id"):  # ZeRO-3
            value.all_gather()
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # FSDP2's DTensor
        if dist.get_rank() == 0:
            gathered[key] = whole.detach().to("cpu", copy=True)
        if hasattr(value, "ds_id"):
            value.partition()
    return gathered


@functools.cache
def patient_group(world):
    """A group whose ranks may wait for hours, while rank 0 writes 140 GB.

    `world`, the default group, is only the cache's key.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(hours=6))


def on_rank_0(run: Callable, *arguments: Any) -> Any:
    """Run on rank 0; every rank returns its result or raises its error, so that no rank hangs."""
    outcome = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            outcome[0] = run(*arguments)
        except Exception as error:  # noqa: BLE001
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=patient_group(dist.group.WORLD))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# ---- Chapter 3: the prefix tree ----

# Families for which the tree equals a padded batch: their attention is causal, over given position
# ids, full or in a window, and goes through AttentionInterface. Others run padded batches: BLOOM
# (ALiBi), Llama 4 (chunked), GPT-OSS (sinks), ...
TREE_FAMILIES = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "bitnet", "cohere", "cohere2", "cohere2_moe",
    "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma3_text", "gemma3n_text", "gemma4_text",
    "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "granite",
    "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "llama",
    "longcat_flash", "mellum", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "modernbert-decoder", "moshi", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt",
    "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3",
    "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text", "seed_oss", "smollm3", "solar_open",
    "starcoder2", "youtu",
)  # fmt: skip
TREE_ATTENTION = "prefix_tree"  # the name of `tree_attention` in transformers' registry
# Options of attention that sdpa applies, or that change nothing here. An unknown one is an error.
KNOWN_OPTIONS = ("dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache")
KNOWN_OPTIONS += ("output_attentions",)
CAUSAL_FROM = 512  # tokens; in shorter rows causal attention saves less than its extra calls cost


def supports_tree(backbone):
    """Whether the tree is exact for this backbone; False if it is spread over several devices."""
    config = backbone.config
    devices = set(getattr(backbone, "hf_device_map", {}).values())
    by_interface = config._attn_implementation in ("sdpa", TREE_ATTENTION)
    return by_interface and config.model_type in TREE_FAMILIES and len(devices) < 2


def tree_rewards(model, ids, visible, needed):
    """`RewardModel._rewards` with each distinct (prefix, token) computed once."""
    tree = PrefixTree(ids, visible, needed, model._send)
    # The backbone passes `tree` down to its attention, and does not change a 4-D mask. This one
    # holds integers, so that sdpa raises an error if `tree` is lost on the way.
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.long, device=tree.ids.device)
    position_ids = tree.columns
    if model.config.model_type == "opt":  # transformers' OPT gives masked padding position -1
        position_ids = position_ids.where(tree.visible, -1)
    inputs = {"input_ids": tree.ids[None], "position_ids": position_ids[None]}  # (1, N)
    rewards = model._score(**inputs, attention_mask=placeholder, tree=tree)
    return rewards[0, tree.node_index]  # (R, E)


class Block(NamedTuple):
    """Rows whose attention is one sdpa call.

    In a causal block, query i is at column i, so that no mask is needed, unless a sliding window is
    shorter than the row. Shorter rows repeat their last query. Their extra keys come after all
    queries that count, or the mask hides them.
    """

    query_nodes: Tensor  # (rows, Q)
    key_nodes: Tensor  # (rows, K)
    is_causal: bool


class PrefixTree:
    """Each distinct (prefix, token) of a batch, once: all that a causal model has to compute.

    A token's hidden state depends only on its prefix and itself. Sorting makes rows with a common
    prefix neighbours. Of a row's needed tokens, those before the first difference from the row
    above are *shared* with it, the rest is *new*. The new tokens of all rows are the N nodes:

        rows    P Q a b      new    P Q a b      nodes, N = 7    P Q a b c d R
                P Q a c d           - - - c d    columns         0 1 2 3 3 4 1
                P R                 - R

    `reference_nodes` in test_critic.py builds the same as a trie, token by token, which is plainer
    and several times slower.

    Args: ids, visible (R, E), as from `align`; needed (R,), tokens of each row that need a reward,
    for the "tokens" loss also padding; send, which moves a tensor to the device.
    Attributes:
        ids: (N,), the packed sequence.
        columns: (N,), each node's column: its position id, and the last column that it may see.
        visible: (N,), whether attention may see the node; False at masked padding.
        node_index: (R, E), the node of each needed token, to read rewards back; else arbitrary.
        blocks: the attention of all distinct rows.
        output_index: (N,), where each node's output is in the concatenated outputs of the blocks.
    """

    @torch.compiler.disable  # its shapes differ from batch to batch
    def __init__(self, ids, visible, needed, send):
        t = torch.arange(ids.size(1), device=ids.device)
        # One integer per token: equal integers are equal tokens, and odd ones are visible. What is
        # not needed gets the smallest integer, which is even, so a row sorts before its extensions.
        unneeded = torch.iinfo(torch.long).min
        tokens = (2 * ids + visible).masked_fill(t >= needed[:, None], unneeded)  # (R, E)
        rows, row_of = torch.unique(tokens, dim=0, return_inverse=True)  # (U, E), sorted; (R,)
        is_needed = rows != unneeded
        is_visible = rows % 2 == 1
        differs = F.pad(rows[1:] != rows[:-1], (0, 0, 1, 0), value=True)  # all of row 0 is new
        is_shared = differs.cumsum(1) == 0  # (U, E)
        is_new = is_needed & ~is_shared
        # New tokens are numbered row by row. A shared token is the node last introduced in its
        # column, by a row above: the largest number so far, which cummax copies down. In the
        # drawing, `a` of the second row is node 2, which the first row introduced.
        number = torch.zeros_like(rows)
        number[is_new] = torch.arange(int(is_new.sum()), device=ids.device)
        nodes = number.cummax(0).values  # (U, E)
        self.ids = send(rows[is_new] // 2)
        self.visible = send(is_visible[is_new])
        self.columns = send(t.expand_as(rows)[is_new])
        self.node_index = send(nodes[row_of])
        # On a CPU padding is the main cost. On an accelerator it is the number of calls, so
        # there is one block of each kind.
        step = 128 if self.ids.is_cpu else 1 << 30
        groups = group_spans(is_shared.sum(1), is_visible.sum(1), is_needed.sum(1), step)
        self.blocks, self.output_index = make_blocks(nodes, groups, len(self.ids), send)
        self._masks = {}

    def masks(self, window, dtype):
        """One additive mask per block, (rows, 1, Q, K), or None, for all layers of this kind."""
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = [self._mask(block, window, dtype) for block in self.blocks]
        return self._masks[window, dtype]

    def _mask(self, block, window, dtype):
        K = block.key_nodes.size(1)
        if block.is_causal and (window is None or window >= K):
            return None
        t = torch.arange(K, device=self.columns.device)  # the column of each key
        column = self.columns[block.query_nodes][:, :, None]  # (rows, Q, 1)
        seen = self.visible[block.key_nodes][:, None] & (t <= column)  # (rows, Q, K)
        if window is not None:
            seen &= t > column - window
        return seen[:, None].to(dtype).log()  # log(0) is -inf


class Span(NamedTuple):
    """Queries of one row, columns [first, last), with the keys that they see, [0, keys)."""

    row: int
    first: int
    last: int
    keys: int


def group_spans(shared, visible, needed, step):
    """The spans of all rows, in groups of one kind and of lengths that differ by less than `step`.

    Args: (U,) each, how many tokens of a row are shared, visible, needed. Returns
    {(is_causal, ...): spans}.
    """
    groups = defaultdict(list)
    counts = torch.stack([shared, visible, needed], 1).tolist()
    for row, (shared_count, visible_count, needed_count) in enumerate(counts):
        # A masked block: new tokens are queries.
        spans = [(False, Span(row, shared_count, needed_count, visible_count))]
        # If more than half is new, causal attention of all tokens costs no more than masked
        # attention of the new ones.
        if visible_count >= CAUSAL_FROM and 2 * shared_count < visible_count:
            causal = Span(row, 0, visible_count, visible_count)
            padding = Span(row, visible_count, needed_count, visible_count)  # hidden, but needed
            spans = [(True, causal), (False, padding)]
        for is_causal, span in spans:
            queries = span.last - span.first
            if queries > 0:
                groups[is_causal, queries // step, span.keys // step].append(span)
    return groups


def make_blocks(nodes, groups, N, send):
    """The blocks, and output_index (N,), as in PrefixTree. nodes (U, E): the node of each token."""
    nodes = F.pad(nodes, (0, 7))  # room to round K up
    blocks = []
    queries_of_blocks = []
    for (is_causal, *_), spans in groups.items():
        row, first, last, keys = torch.tensor(spans, device=nodes.device).T[:, :, None]  # (rows, 1)
        Q = round_up(int((last - first).max()))
        K = round_up(int(keys.max()))
        column = first + torch.arange(Q, device=nodes.device)  # (rows, Q)
        nodes_of_row = nodes[row.squeeze(1)]  # (rows, E + 7)
        query_nodes = nodes_of_row.gather(1, column.minimum(last - 1))
        blocks.append(Block(send(query_nodes), send(nodes_of_row[:, :K]), is_causal))
        queries_of_blocks.append(query_nodes.flatten())
    queries = torch.cat(queries_of_blocks)
    # A node may be the query at several places. Rows that share it agree on its output. But a row's
    # last query is repeated, and a repetition may see other keys, so the first place is taken: of
    # queries [4, 5, 5, 5], node 5's output is at place 1.
    place = torch.arange(len(queries), device=nodes.device)
    output_index = nodes.new_full([N], len(queries)).scatter_reduce(0, queries, place, "amin")
    return blocks, send(output_index)


def round_up(length):
    """To a multiple of 8, which the kernels prefer: 13 becomes 16."""
    return (length + 7) // 8 * 8


@torch.compiler.disable  # its shapes differ from batch to batch
def tree_attention(module, query, key, value, attention_mask, tree=None, **options):
    """Attention, the only operation that mixes tokens, is computed on rows again.

    Args: query (1, heads, N, D); key, value (1, KV heads, N, D). Returns (1, N, heads, D).
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name, option in options.items():
        if option is not None and name not in KNOWN_OPTIONS:
            raise ValueError(f"the prefix tree does not know {name}: pass share_prefix=False")
    # How many columns a query sees. None means all (EXAONE 4). If the option is not passed, the
    # module has it (Qwen2-MoE).
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    outputs = []
    for block, mask in zip(tree.blocks, tree.masks(window, query.dtype)):
        q = take(query, block.query_nodes)  # (rows, heads, Q, D)
        k = take(key, block.key_nodes)  # (rows, KV heads, K, D)
        v = take(value, block.key_nodes)
        # Where the mask is None, this function passes is_causal=True to sdpa.
        output, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
        outputs.append(output.flatten(0, 1))  # (rows * Q, heads, D)
    return torch.cat(outputs).index_select(0, tree.output_index)[None], None


def take(x, nodes):
    """(1, heads, N, D) at nodes (rows, L): (rows, heads, L, D)."""
    x = x[0].transpose(0, 1).index_select(0, nodes.flatten())
    return x.unflatten(0, nodes.shape).transpose(1, 2)


transformers.AttentionInterface.register(TREE_ATTENTION, tree_attention)
transformers.AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
