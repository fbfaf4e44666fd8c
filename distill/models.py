"""Loading models and tokenizers, LoRA, and the student as a module whose forward is its loss."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.loss import Objective, head_loss
from distill.recipe import Recipe

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
)
ADAPTER = "adapter_model.safetensors"


def locate(name: str, what: str) -> str:
    """A folder, or a hub id left as it is. Raises DistillError for a folder that is none."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise DistillError(f"The {what} {name} holds no config.json; expected a Hugging Face model folder.")
        return str(path)
    if not name:
        raise DistillError(f"The recipe names no {what}; add `{what}: FOLDER_OR_HUB_ID`.")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise DistillError(f"There is no {what} {name}; expected a folder or a hub id like `org/name`.")


def load_tokenizer(name: str, what: str = "student"):
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(locate(name, what))
    except (OSError, ValueError) as exc:
        raise DistillError(f"The tokenizer of the {what} {name} cannot be read: {exc}") from exc
    if not tokenizer.is_fast:
        raise DistillError(f"The {what} {name} has no tokenizer.json; convert its tokenizer to the fast format first.")
    if tokenizer.eos_token_id is None:
        raise DistillError(f"The tokenizer of the {what} {name} names no EOS token; answers could never end.")
    return tokenizer


def load_model(name: str, what: str, dtype: torch.dtype, bits: int = 16) -> nn.Module:
    """A causal language model in `eval` mode, from safetensors only, never with code of the checkpoint."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {}
    if bits < 16:
        if not torch.cuda.is_available():
            raise DistillError(f"teacher_bits {bits} needs a CUDA GPU and bitsandbytes; say teacher_bits=16.")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4"
        )
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            locate(name, what), dtype=dtype, attn_implementation="sdpa", use_safetensors=True, **options
        )
    except (OSError, ValueError, ImportError) as exc:
        raise DistillError(f"The {what} {name} cannot be loaded: {exc}") from exc
    check_head(model, what)
    return model.eval()


def check_head(model: nn.Module, what: str) -> None:
    """The chunked loss computes `hidden @ head.T`; refuse models whose logits are anything else."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_scale"):
        if (value := getattr(model.config, name, None)) not in (None, 1, 1.0):
            raise DistillError(f"The {what}'s config has {name} = {value}; the chunked loss knows plain heads only.")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise DistillError(f"The {what}'s head is no plain linear layer, which the chunked loss needs.")


def generation_ends(name: str) -> int | list[int] | None:
    """The end tokens of a model's generation config, if it has one."""
    import transformers

    try:
        return transformers.GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        return None


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return getattr(model, model.base_model_prefix)


def head_of(model: nn.Module) -> Tensor:
    """The head's weight [V, H]."""
    return model.get_output_embeddings().weight


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Last hidden states [B, L, H] of right-padded ids [B, L]. Causal attention needs no mask: nothing real sees padding."""
    return backbone(model)(input_ids=ids, use_cache=False).last_hidden_state


class HiddenStates(nn.Module):
    """`hidden_states` as a forward, so that whoever shards a model sees one call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return hidden_states(self.model, ids)


class Student(nn.Module):
    """A language model whose forward is its loss, so that DDP and FSDP see one call per backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, weights: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """ids [B, L] right-padded; positions [N] into the flat B*L; weights [N]. Gives (weighted sum, losses [N])."""
        hidden = hidden_states(self.model, ids).flatten(0, 1)[positions]
        return head_loss(hidden, head_of(self.model), weights, objective)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with LoRA in every linear layer of its blocks; only the adapter is trainable, in fp32."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as exc:
        raise DistillError("lora_rank needs the package peft (`pip install peft`).") from exc
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = inject_adapter_in_model(lora_config(recipe, LoraConfig), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    return model


def lora_config(recipe: Recipe, kind):
    return kind(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or 2 * recipe.lora_rank,
        lora_dropout=0.0,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )


def lora_layers(model: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base model inside a LoRA model."""
    layers = lora_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_tokenizer(source: str, target: Path) -> None:
    """The tokenizer's files as they are, byte for byte, so that template and special tokens stay the model's own."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES), local_files_only=True))
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as if it had never had adapters: LoRA products are added to the weights they adapt."""
    state = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, value in model.state_dict().items():
        if "lora_" in name:
            continue
        layer, found, _ = name.partition(".base_layer.")
        if found and name.endswith("weight"):
            delta = layers[layer].get_delta_weight("default")
            value = value.float() + delta.float()
        state[name.replace(".base_layer.", ".")] = value
    return state


def save_model(model: nn.Module, source: str, target: Path, dtype: torch.dtype) -> None:
    """A Hugging Face folder: weights as safetensors in `dtype`, config, and the files of `source`'s tokenizer."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    head = "lm_head.weight" if model.config.tie_word_embeddings else None  # a tied head is stored once
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in merged(model).items()
        if name != head
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    copy_tokenizer(source, target)


def save_student(model: nn.Module, recipe: Recipe, target: Path, dtype: torch.dtype) -> None:
    save_model(model, recipe.student, target, dtype)
    if recipe.lora_rank:
        save_adapter(model, recipe, target)


def save_adapter(model: nn.Module, recipe: Recipe, target: Path) -> None:
    """The adapter alone, in `adapter/`, as peft reads it."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder = target / "adapter"
    folder.mkdir()
    tensors = {
        f"base_model.model.{name.replace('.default', '')}": value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if "lora_" in name
    }
    save_file(tensors, folder / ADAPTER)
    config = lora_config(recipe, LoraConfig)
    config.base_model_name_or_path = recipe.student
    config.save_pretrained(folder)
