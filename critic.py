# SPDX-License-Identifier: MIT
# The reward/critic model of RLHF, modelled on DeepSpeed-Chat's `create_critic_model` and `RewardModel`.
"""A pretrained decoder with a linear value head, for reward modelling and as PPO's critic. Chapter 1 is the
whole model on a padded batch, chapter 2 the prefix tree. Letters in shape comments: B pairs; R rows (2B in
training: B chosen, then B rejected); U distinct rows; T columns of the input; E columns whose reward is
needed; H hidden size; N nodes of the tree; Q queries and K keys of a row; D head size."""

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
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GenericForSequenceClassification

# Process-wide: cuDNN's attention gives NaN gradients on Hopper with an explicit mask (pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)

# ---- Chapter 1: the reward model on a padded batch ----


def align(
    input_ids: Tensor, attention_mask: Tensor | None, pad_id: int, num_padding_at_beginning: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the content of each row to column 0, so that left, right and interior padding become one case.

    With a mask, content is where the mask is 1. Without one, it runs from the first to the last id that is
    not PAD, plus the `num_padding_at_beginning` ids before it: OPT starts every text with BOS, which has
    PAD's id once pad = eos is set (DeepSpeedExamples #455). Returns, on the CPU: ids (R, T), content, then
    PAD; is_key (R, T), what attention sees: content, or everything without a mask, as in DeepSpeed-Chat;
    source (R, T), the column in input_ids; length (R,). Raises ValueError for bad shapes and empty rows."""
    ids, n, t = input_ids.cpu().long(), num_padding_at_beginning, torch.arange(input_ids.size(-1))
    mask = ids if attention_mask is None else attention_mask.cpu()
    if ids.dim() != 2 or not ids.numel() or mask.shape != ids.shape:
        raise ValueError(f"input_ids {tuple(ids.shape)}, mask {tuple(mask.shape)}: pass (rows, tokens)")
    content = mask.bool()  # (R, T)
    if attention_mask is None:
        is_text = F.pad((ids != pad_id).long(), (0, n))  # (R, T + n), so that `begun` looks n columns ahead
        begun, not_over = is_text.cumsum(1)[:, n:], is_text.flip(1).cumsum(1).flip(1)[:, : len(t)]
        content = (begun > 0) & (not_over > 0)
    length = content.sum(1)
    if not length.all():
        raise ValueError(f"row {length.argmin()} of input_ids is only padding: drop the row, or its pair")
    source = (~content).int().argsort(dim=1, stable=True)  # content first, in its order
    inside = t < length[:, None]
    return ids.gather(1, source).where(inside, pad_id), inside | (attention_mask is None), source, length


def ranking_loss(rewards: Tensor, length: Tensor, divergence: Tensor, loss_on: str) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss of B pairs, `-log sigmoid(chosen - rejected)`: (), and the end scores (2B,).

    "tokens" averages it over the positions [p, e), from the divergence p to the end e of the longer row, as
    DeepSpeed-Chat does, with padding of the shorter row (DeepSpeedExamples #316). "end" compares the end
    scores (InstructGPT, arXiv:2203.02155). Identical texts, for which p is e, give log 2 and no gradient.
    Args: rewards (2B, E), aligned at column 0; length (2B,), content tokens; divergence (B,), p."""
    end_scores = rewards.gather(1, length[:, None] - 1).squeeze(1)  # (2B,)
    p, e = divergence[:, None], torch.maximum(*length.chunk(2))[:, None]  # (B, 1)
    t = torch.arange(rewards.size(1), device=rewards.device)
    if loss_on == "end":
        rewards, t = end_scores[:, None], e - 1  # one position per pair, its last
    chosen, rejected = rewards.chunk(2)  # (B, E) or (B, 1)
    difference = (chosen - rejected).masked_fill(t < p, 0)  # identical texts give 0 despite dropout
    counted = (t >= torch.minimum(p, e - 1)) & (t < e)  # of identical texts, the last position
    # (B,); a sum in fp16 could overflow
    loss = torch.where(counted, -F.logsigmoid(difference), 0).sum(1, dtype=torch.float32) / counted.sum(1)
    return loss.mean().to(rewards.dtype), end_scores


class ValueHead(nn.Linear):
    """`nn.Linear(H, 1)`, in float32 if RewardModel sets `in_float32`: bf16 has steps of 0.03 above 4, so
    scores tie. The cast is in the module's own forward, because ZeRO-3 gathers the weight only there."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.in_float32:
            return super().forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """A decoder with a value head: r(t), one scalar per token. Names and state dict match DeepSpeed-Chat's.

    Args: base_model, the decoder without its language-model head, as AutoModel returns it. tokenizer, whose
        pad_token_id should not be EOS. num_padding_at_beginning, leading PAD ids of every text: 1 for OPT
        with pad = eos and no mask, else 0. compute_fp32_loss, to compute value head and loss in float32.
    Attributes: loss_on, "tokens" (default) or "end". share_prefix, False to turn the prefix tree off."""

    prepare_inputs_for_generation = None  # PEFT reads it with task_type="CAUSAL_LM"

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: Tokenizer,
        num_padding_at_beginning: int = 0,
        compute_fp32_loss: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.PAD_ID, name = base_model.config, tokenizer.pad_token_id, type(base_model).__name__
        if self.PAD_ID is None:
            raise ValueError("the tokenizer has no pad_token_id: set tokenizer.pad_token, but not to EOS")
        check_decoder(self.config, name)
        if isinstance(base_model, PreTrainedModel) and base_model.base_model is not base_model:
            raise ValueError(f"{name} has a head: pass its base_model, or load it with AutoModel")
        self.loss_on, self.share_prefix, self.rwtransformer = "tokens", True, base_model
        self.num_padding_at_beginning = num_padding_at_beginning
        width = getattr(self.config, "word_embed_proj_dim", self.config.hidden_size)  # OPT-350m's is narrower
        self.v_head = ValueHead(width, 1, bias=False, dtype=base_model.dtype, device=base_model.device)
        self.v_head.in_float32 = compute_fp32_loss
        # Its device is the model's: with ZeRO-3 offload the parameters are on the CPU.
        self.register_buffer("on_device", torch.empty(0, device=base_model.device), persistent=False)

    def __getattr__(self, name: str) -> Any:
        # gradient_checkpointing_enable, transformers 6's name for it, and the methods that turn it off.
        return getattr(self.rwtransformer, name) if "_checkpointing_" in name else super().__getattr__(name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> dict:
        """The ranking loss of B pairs, however the rows are padded.

        Args: input_ids (2B, T), B chosen rows, then the B rejected ones. Keep it on the CPU: then nothing is
            read back from the model's device. attention_mask (2B, T), 1 at content; if None, PAD ids are
            padding, but attention sees them. others: trainers' extras are ignored, any other must be None.
        Returns loss (), and the end scores chosen_mean_scores and rejected_mean_scores (B,), with gradients.
        Raises ValueError, which names the argument or row, and the fix."""
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
        **others: Any,
    ) -> Tensor | dict[str, Tensor]:
        """One value per token of R rows, for PPO's critic and the frozen reward model.

        Args: as in `forward`, but R rows; PPO pads prompts left, responses right. `prompt_length` is ignored.
        Returns values (R, T), 0 at padding; unless return_value_only, a dict with chosen_end_scores (R,)."""
        ids, is_key, source, length = self._align(input_ids, attention_mask, others)
        rewards = self._rewards(ids, is_key, length)  # (R, E)
        last, source = self._send(length[:, None] - 1), self._send(source[:, : rewards.size(1)])
        content = torch.arange(rewards.size(1), device=rewards.device) <= last
        values = rewards.new_zeros(ids.shape).scatter(1, source, rewards.where(content, 0))
        end_scores = rewards.gather(1, last).squeeze(1)
        return values if return_value_only else {"values": values, "chosen_end_scores": end_scores}

    def _align(self, input_ids: Tensor, attention_mask: Tensor | None, others: dict) -> tuple[Tensor, ...]:
        ignored = "return_dict", "num_items_in_batch", "prompt_length"
        if given := [k for k, x in others.items() if x is not None and x is not False and k not in ignored]:
            raise ValueError(f"{', '.join(given)}: not supported, leave it out")
        return align(input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning)

    def _rewards(self, ids: Tensor, is_key: Tensor, needed: Tensor) -> Tensor:
        """r(t) for the first needed[i] tokens of aligned row i: (R, E) with E = max(needed)."""
        ids, is_key = ids[:, : needed.max()], is_key[:, : needed.max()]
        if self.share_prefix and use_tree(self.rwtransformer):
            return tree_rewards(self, ids, is_key, needed)
        inputs = {"input_ids": self._send(ids), "attention_mask": self._send(is_key.long())}
        return self.v_head(self.rwtransformer(**inputs, use_cache=False)[0]).squeeze(-1)

    def _send(self, x: Tensor) -> Tensor:
        """Copy to the model's device, from pinned memory, so that the copy does not block."""
        return (x.pin_memory() if self.on_device.is_cuda else x).to(self.on_device.device, non_blocking=True)


def check_decoder(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError unless the config is that of a causal text decoder."""
    two_way = transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    causal = getattr(config, "is_causal", True) is not False and not config.is_encoder_decoder
    # Gemma's "vision" attends in both directions within images only.
    causal &= getattr(config, "use_bidirectional_attention", None) in (None, False, "vision")
    is_text = config.get_text_config(decoder=True) is config and type(config) in transformers.MODEL_MAPPING
    if not (causal and is_text and hasattr(config, "vocab_size")) or any(type(config) in m for m in two_way):
        raise ValueError(f"{name} is a {config.model_type} model: a critic needs a causal text decoder")


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
    """Memory-map the weights. `trained`: all keys must match; else the head is newly initialised."""
    hf_class = reward_class(config)
    prefix = hf_class.base_model_prefix
    key_mapping = {
        r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": f"{prefix}.",  # of a multimodal model
        r"^rwtra(?:nsformer|nrsformer)\.": f"{prefix}.",  # DeepSpeed-Chat's name, and its older spelling
        # Heads of DeepSpeed-Chat (v), OpenRLHF (value, or its own), UltraRM (regression), and Beaver (score).
        rf"^({getattr(config, 'value_head_prefix', 'score')}|(v|value|regression|score)_head)\.": "score.",
        rf"^(?!{prefix}\.|score\.)(.+)": rf"{prefix}.\1",  # a bare decoder
    }
    options = {"key_mapping": key_mapping, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = hf_class.from_pretrained(path, config=config, dtype=dtype, **options)
    except Exception as error:  # the type depends on the format
        raise ValueError(f"the weights in {path} cannot be read, download them again: {error}") from error
    # The masks are buffers that old versions of transformers saved with GPT-2, GPT-J and GPT-Neo.
    kinds, masks = ("missing", "mismatched", "unexpected"), r"\.attn(\.attention)?\.(masked_)?bias$"
    found = {x: sorted(k for k in map(str, info[f"{x}_keys"]) if not re.search(masks, k)) for x in kinds}
    hint, has_head = "download the files again", "score.weight" not in found["missing"]
    if not trained:  # other weights of a base model are ignored: a vision tower, the language model's head
        found = {x: [k for k in found[x] if "score.weight" not in k] for x in kinds[:2]}
        if has_head:
            warnings.warn(f"the value head of {path} is reinitialised; rlhf_training=True keeps it")
    elif has_head or any(not re.search("lm_head|embed_out", key) for key in found["unexpected"]):
        hint = "the head must be score.weight, one row and no bias: rename it, or download the files again"
    else:
        hint = "it looks like a base model: train it first (rlhf_training=False)"
    if problems := "; ".join(f"{kind} {', '.join(keys[:5])}" for kind, keys in found.items() if keys):
        raise ValueError(f"the weights in {path} do not match the model: {problems}; {hint}")
    return model


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
        model_name_or_path: a local folder or a hub id; safetensors or pickle, complete or sharded.
        tokenizer: if it has more tokens than a base model, the embeddings grow, to a multiple of 8.
        ds_config: DeepSpeed's; bf16 or fp16 sets the dtype (else float32), stage 3 partitions the model.
        rlhf_training: load the head too, from a reward checkpoint of DeepSpeed-Chat (`rwtransformer.*`) or a
            transformers `AutoModelForSequenceClassification` with one label; else it is newly initialised.
        dropout: in [0, 1), overrides every dropout probability of the config; None leaves them.
        zero_stage: kept from DeepSpeed-Chat; may only repeat the stage in `ds_config`.
    Raises ValueError, which names the argument, file or key, and the fix; OSError if there is no model."""
    ds_config, path = ds_config or {}, model_name_or_path
    enabled = {name: (ds_config.get(name) or {}).get("enabled") for name in ("bf16", "fp16")}
    if "auto" in enabled.values():
        raise ValueError('bf16 or fp16 in ds_config has "enabled": "auto": write true or false')
    dtype = torch.bfloat16 if enabled["bf16"] else torch.float16 if enabled["fp16"] else torch.float32
    zero = ds_config.get("zero_optimization") or {}
    if zero_stage not in (0, stage := zero.get("stage", 0)):
        raise ValueError(f"zero_stage is {zero_stage}, but ds_config has stage {stage}: leave zero_stage out")
    if not 0 <= (dropout or 0) < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and less than 1")
    others = {"adapter_config.json": "a PEFT adapter", "*states.pt": "a DeepSpeed checkpoint"}
    if kinds := [others[pattern] for pattern in others if any(Path(path).glob(pattern))]:
        raise ValueError(f"{path} is {kinds[0]}: pass what save_critic_model wrote, after merge_and_unload")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # custom code would prompt
    config = config if config.is_encoder_decoder else config.get_text_config(decoder=True)  # if multimodal
    check_decoder(config, path)
    config.num_labels = 1
    for part in () if dropout is None else (config, getattr(config, "attn_config", config)):  # MPT nests it
        for name, value in vars(part).items():
            if re.search("dropout|pdrop$", name) and type(value) in (int, float):
                vars(part)[name] = dropout or type(value)(0)  # bypasses validation: MPT's must be an int
    if (grows := len(tokenizer) > config.vocab_size) and rlhf_training:
        raise ValueError(f"the tokenizer has more tokens than {path}: use the tokenizer saved there")
    hf_model = load_weights(path, config, dtype, rlhf_training)
    if grows:
        hf_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    model = RewardModel(hf_model.base_model, tokenizer, num_padding_at_beginning, compute_fp32_loss)
    if rlhf_training:
        model.v_head.weight = hf_model.score.weight
    if stage == 3:
        partition(model, zero)
    return model


def save_critic_model(model: nn.Module, tokenizer: Tokenizer, output_dir: str | os.PathLike) -> None:
    """Write the critic for transformers' `AutoModelForSequenceClassification`, TRL and vLLM.

    Every rank calls it, with a RewardModel or the DeepSpeed engine around it. Rank 0 writes to a staging
    directory in `output_dir`, then moves the files, weights last. Errors are raised on every rank, and leave
    older weights as they were; ValueError if the keys are not a critic's."""
    model = getattr(model, "module", model)
    config = type(model.config).from_dict(model.config.to_dict())  # a copy
    # "regression": else transformers' pipeline returns the sigmoid of the score.
    config.update({"num_labels": 1, "pad_token_id": model.PAD_ID, "problem_type": "regression"})
    with torch.device("meta"):  # a template without data, for names and config
        template = reward_class(config)(config).to(model.rwtransformer.dtype)
    names = {"rwtransformer": template.base_model_prefix, "v_head": "score"}
    parts = ((key.partition("."), value) for key, value in model.state_dict(keep_vars=True).items())
    state = {f"{names.get(first, first)}.{rest}": value for (first, _, rest), value in parts}
    if differing := sorted(state.keys() ^ template.state_dict().keys()):
        what = f"not saved as {type(template).__name__}, keys differ: {', '.join(differing[:4])}"
        raise ValueError(f"{what}; merge adapters (merge_and_unload), unwrap a compiled model (_orig_mod)")
    write = lambda weights: write_folder(Path(output_dir), template, weights, tokenizer)
    write_from_rank_0(write, state) if dist.is_initialized() else write(state)


def write_folder(final: Path, template: PreTrainedModel, state: dict, tokenizer: Tokenizer) -> None:
    staging = final / ".writing"
    shutil.rmtree(staging, ignore_errors=True)
    template.save_pretrained(staging, state_dict=state)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else one set after loading is lost
    tokenizer.save_pretrained(staging)
    new = sorted(os.listdir(staging), key=lambda name: (".safetensors" in name, name))
    for name in new:
        shutil.rmtree(final / name, ignore_errors=True)  # a directory of chat templates
        os.replace(staging / name, final / name)
    older = r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?|(chat|added|special)_\w+\.\w+"
    for name in {name for name in os.listdir(final) if re.fullmatch(older, name)} - set(new):
        (final / name).unlink()  # a loader might read it
    staging.rmdir()


# ---- Chapter 2: the prefix tree, and several ranks ----

# Families that a test saw match a padded batch: attention is causal over given position ids, full or in a
# window, and goes through transformers' AttentionInterface. Others run padded batches: BLOOM and MPT (ALiBi),
# Llama 4 (chunked), Qwen3-Next (linear), GPT-OSS (attention sinks), Gemma 2 (soft-capped scores), ...
TREE_FAMILIES = """afmoe apertus arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v2
deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text gemma3n_text
gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared
helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna
llama longcat_flash mellum minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi
nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen2_vl_text qwen2_5_vl_text qwen3
qwen3_moe qwen3_vl_text qwen3_vl_moe_text seed_oss smollm3 solar_open starcoder2 youtu""".split()
TREE_ATTENTION = "prefix_tree"  # the name of `tree_attention` in transformers' registry


def use_tree(backbone: PreTrainedModel) -> bool:
    """Switch the backbone to the tree's attention where that is exact. Returns whether it is."""
    config = backbone.config
    by_interface = backbone._supports_attention_backend and config._attn_implementation == "sdpa"
    if by_interface and config.model_type in TREE_FAMILIES:
        backbone.set_attn_implementation(TREE_ATTENTION)  # which is sdpa if no tree is passed
    return config._attn_implementation == TREE_ATTENTION


def tree_rewards(model: RewardModel, ids: Tensor, is_key: Tensor, needed: Tensor) -> Tensor:
    """`RewardModel._rewards` with each distinct (prefix, token) computed once."""
    tree = PrefixTree(ids, is_key, needed, model._send)
    # The backbone passes unknown keyword arguments down to its attention, so `tree` gets there. Given a 4-D
    # mask, it builds none; as this one holds integers, sdpa raises an error if a backbone drops `tree`.
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.long, device=tree.ids.device)
    is_opt = model.config.model_type == "opt"  # transformers' OPT gives masked padding position -1
    position_ids = tree.columns.where(tree.is_key, -1) if is_opt else tree.columns
    inputs = {"input_ids": tree.ids[None], "position_ids": position_ids[None], "attention_mask": placeholder}
    hidden = model.rwtransformer(**inputs, tree=tree, use_cache=False)[0]  # (1, N, H)
    return model.v_head(hidden).flatten()[tree.node_index]  # (R, E)


def block_labels(queries: Tensor, keys: Tensor, device: torch.device) -> Tensor:
    """Labels (U, 1 or 2) from the rows' counts of queries and keys (U,): rows with equal labels form a block,
    one sdpa call. On a CPU padding costs most: in a block counts differ by less than 64. On an accelerator
    calls do: one block, or two above 8192 padded queries, split at half the longest row's queries."""
    if device.type == "cpu":
        return torch.stack([queries, keys], 1).add(63) // 64
    longest = queries.max()
    return ((2 * queries > longest) & (len(queries) * longest > 8192)).long()[:, None]


class PrefixTree:
    """Each distinct (prefix, token) of a batch, once: all that a causal model has to compute.

    A token's hidden state depends only on itself and the tokens before it in its row, so rows with a common
    prefix share its states. Sorting makes such rows neighbours. A row's tokens from where it first differs
    from the row above are new; the new tokens of all rows are the N nodes:

        rows    P Q a b      new    P Q a b      nodes, N = 7    P Q a b c d R
                P Q a c d           . . . c d    columns         0 1 2 3 3 4 1
                P R                 . R
    Args: ids, is_key (R, E), as from `align`; needed (R,), how many tokens of each row (with the "tokens"
        loss also padding of the shorter row); send, which moves a tensor to the model's device.
    Attributes:
        ids, columns, is_key (N,): the packed sequence; each node's column, which is its position id and the
            last column that it sees; whether nodes may see it.
        node_index (R, E): the node of each token, for reading rewards back; arbitrary beyond `needed`.
        blocks: for each group of distinct rows, two tensors of node numbers: query_nodes (U, Q), the new
            nodes of each row; key_nodes (U, K), the nodes of its columns up to the last visible one. Shorter
            rows are padded: with their last query, and with keys that the mask hides.
        output_index (N,): where the output of each node stands in the concatenated outputs of the blocks."""

    @torch.compiler.disable  # its shapes differ from batch to batch
    def __init__(self, ids: Tensor, is_key: Tensor, needed: Tensor, send: Callable[[Tensor], Tensor]) -> None:
        t = torch.arange(ids.size(1))
        # The key tells masked padding from the same id as content. Columns that are not needed get the
        # smallest key: a row sorts before its extensions, so that each distinct row has a new token.
        unneeded = torch.iinfo(torch.long).min
        merge_key = (2 * ids + is_key).masked_fill(t >= needed[:, None], unneeded)  # (R, E)
        rows, row_of = torch.unique(merge_key, dim=0, return_inverse=True)  # (U, E), distinct; (R,)
        differs = F.pad(rows[1:] != rows[:-1], (0, 0, 1, 0), value=True)  # all of the first row is new
        new = (differs.cumsum(1) > 0) & (rows > unneeded)
        # Numbers grow from row to row, so the running maximum of a column is its newest node at or above.
        nodes = ((new.flatten().cumsum(0) - 1).view_as(new) * new).cummax(0).values  # (U, E)
        self.node_index = send(nodes[row_of])
        self.ids, self.is_key = send(rows[new] // 2), send(rows[new] % 2 == 1)
        self.columns = send(t.expand_as(rows)[new])
        # Hidden keys come last, and so can be cut off.
        queries, keys, lengths = new.sum(1), (rows % 2).sum(1), (rows > unneeded).sum(1)  # (U,)
        block = torch.unique(block_labels(queries, keys, self.ids.device), dim=0, return_inverse=True)[1]
        self.blocks, output_index, offset = [], torch.empty(len(self.ids), dtype=torch.long), 0
        nodes = F.pad(nodes, (0, 7))  # so that K can round up to a multiple of 8, for the kernels
        for in_block in F.one_hot(block).bool().T:  # (U,)
            Q, K = (x[in_block].max().add(7).item() // 8 * 8 for x in (queries, keys))
            count, length = queries[in_block, None], lengths[in_block, None]
            query_nodes = nodes[in_block].gather(1, (length - count + torch.arange(Q)).minimum(length - 1))
            real = torch.arange(Q) < count  # (U, Q); the rest repeats the last query
            output_index[query_nodes[real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += real.numel()
            self.blocks.append((send(query_nodes), send(nodes[in_block, :K])))
        self.output_index = send(output_index)
        self.masks: dict[tuple, list[Tensor]] = {}  # the cache of `masks_for`

    def masks_for(self, window: int | None, repeats: int, dtype: torch.dtype) -> list[Tensor]:
        """One additive mask per block, (U, 1, repeats * Q, K): 0 where a key is seen, else -inf. `repeats`:
        query heads per KV head. Cached, so that autograd keeps one copy for all layers."""
        key = window, repeats, dtype
        if key not in self.masks:
            self.masks[key] = []
            for query_nodes, key_nodes in self.blocks:
                column = self.columns[query_nodes][:, :, None]  # (U, Q, 1)
                t = torch.arange(key_nodes.size(1), device=column.device)  # the column of each key
                seen = self.is_key[key_nodes][:, None] & (t <= column)  # (U, Q, K)
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

    Args: query (1, heads, N, D), key, value (1, KV heads, N, D), grouped as in arXiv:2305.13245. options: the
        layer's, as `sliding_window`, the columns a query sees; and `tree`, without which this is sdpa.
    Returns (1, N, heads, D) with value's D, and no attention weights. A query that sees no key gets 0."""
    tree = options.pop("tree", None)
    if tree is None:
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    # sliding_window=None: full attention (EXAONE 4). No such option: the module's window (Qwen2-MoE).
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    settings = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    heads, kv_heads, outputs = query.size(1), key.size(1), []
    masks = tree.masks_for(window, heads // kv_heads, query.dtype)
    # (N, heads, D) -> (U, heads, Q or K, D)
    gather = lambda x, nodes: x.index_select(0, nodes.flatten()).unflatten(0, nodes.shape).transpose(1, 2)
    for (query_nodes, key_nodes), mask in zip(tree.blocks, masks):
        q, k, v = gather(query, query_nodes), gather(key, key_nodes), gather(value, key_nodes)
        # Few kernels support a mask with grouped heads, so the query heads of a KV head become more queries.
        q = q.reshape(len(q), kv_heads, -1, q.size(3))
        x = F.scaled_dot_product_attention(q, k, v, mask, **settings)
        outputs.append(x.reshape(len(q), heads, -1, v.size(3)).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, tree.output_index)[None], None


transformers.AttentionInterface.register(TREE_ATTENTION, tree_attention)
transformers.AttentionMaskInterface.register(TREE_ATTENTION, transformers.AttentionMaskInterface()["sdpa"])


def partition(model: RewardModel, zero_optimization: dict[str, Any]) -> None:
    """Broadcast rank 0's parameters, since new weights differ between ranks, and partition them."""
    import deepspeed

    if "LOCAL_RANK" not in os.environ:
        raise ValueError("ds_config has ZeRO stage 3, which partitions over ranks: launch with deepspeed")
    accelerator = deepspeed.get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))  # which receives rank 0's broadcast
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_optimization}
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=model.rwtransformer.dtype)
    for buffer in model.buffers():  # zero.Init does not move them
        buffer.data = buffer.to(accelerator.current_device_name())


def on_rank_0(run: Callable[[], Any]) -> Any:
    """Run on rank 0; every rank returns its result or raises its error, so that no rank hangs."""
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = run()
        except (Exception, SystemExit) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def write_from_rank_0(write: Callable[[dict], None], state: dict[str, Tensor]) -> None:
    """Copy a state dict to rank 0's CPU, the parameters of ZeRO-3 one by one, and write it there."""
    for key, value in state.items():
        if partitioned := hasattr(value, "ds_id"):
            value.all_gather()
        state[key] = value.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None
        if partitioned:
            value.partition()
    on_rank_0(lambda: write(state))
