"""Pretrained models: from the Hub or a folder, adapters and quantised weights included."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from kd.errors import UserError
from kd.models.folders import CONFIG, check_config, check_name, check_weights, meant
from kd.system.network import offline_unless_reachable

ADAPTER, BASE = "adapter_config.json", "base_model_name_or_path"


def pretrained(name: str, option: str):
    """Return the causal LM of a Hub name or folder, float32, from safetensors and without running its code.

    Dropout is off, so that probabilities in training are those at the time of sampling, as MiniLLM's ratio needs. An
    adapter of PEFT, such as LoRA, is merged into the model that it was trained on.
    """
    from transformers import AutoModelForCausalLM

    if base := adapter_base(name, option):
        return with_adapter(pretrained(base, f"{option}={name} {BASE}"), name, option)
    config = config_of(name, option)
    for part in (config, config.get_text_config()):
        for key in [k for k, v in vars(part).items() if "drop" in k and type(v) is float]:
            setattr(part, key, 0.0)
        if getattr(part, "rescale_every", None):  # RWKV halves weights in place whenever it is in eval mode
            part.rescale_every = 0
    if Path(name).is_dir():
        check_weights(Path(name), f"{option}={name}")
    settings = dict(config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    model, info = from_hub(AutoModelForCausalLM, name, f"{option}={name}", **settings)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            option=option,
            got=name,
            why=f"its files lack {len(missing)} weights, {', '.join(missing[:3])} among them, which would stay random",
            hint="download the model again, or choose another one",
        )
    return model


def config_of(name: str, option: str):
    """Return the config of a Hub name or folder; raise UserError if it needs code, or unsupported quantised weights."""
    from transformers import AutoConfig

    if Path(name).is_dir():
        check_config(Path(name), f"{option}={name}")
    from_hub(_Harmless, name, f"{option}={name}")
    config = from_hub(AutoConfig, name, f"{option}={name}")
    for part in (config, config.get_text_config()):
        quantisation = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
            method = getattr(method, "value", method)
            if not method and isinstance(quantisation, dict) and {"load_in_4bit", "load_in_8bit"} & quantisation.keys():
                method = "bitsandbytes"  # whose older files do not name it
            refused = UserError(
                option=option,
                got=name,
                why=f"its weights are quantised ({method or 'unknown method'})",
                need="weights in floating point",
                hint="give the model from which this one was quantised, which its model card names",
            )
            if not str(method).startswith("bitsandbytes"):  # transformers cannot turn the weights of others back
                raise refused
            command = (
                "python -c 'import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
                "name, new = sys.argv[1:]; M.from_pretrained(name).dequantize().save_pretrained(new); "
                f"T.from_pretrained(name).save_pretrained(new)' {shlex.quote(name)} NEW_FOLDER"
            )
            hint = f"{refused.hint}; or, with the package bitsandbytes and a place for the new folder, type"
            raise refused.replace(hint=hint, commands=(command,))
    return config


def adapter_base(name: str, option: str) -> str | None:
    """Return the Hub name or folder of the model that a PEFT adapter was trained on; None for a whole model."""
    path = from_hub(_File, name, f"{option}={name}", file=ADAPTER)
    if path is None:
        return None
    if from_hub(_File, name, f"{option}={name}", file=CONFIG) is not None:
        raise UserError(
            option=option,
            got=name,
            why=f"holds a whole model ({CONFIG}) and an adapter ({ADAPTER}), and only one of them can be meant",
            hint="keep the adapter in another folder, or remove the adapter if it is merged into the model already",
        )
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8")).get(BASE)
    except (ValueError, AttributeError):
        base = None
    if not base or not isinstance(base, str):
        raise UserError(
            option=option,
            got=name,
            why=f"its {ADAPTER} does not name the model that the adapter belongs to",
            hint=f"write that model's name or folder into {ADAPTER}, as {BASE}",
        )
    return base


def with_adapter(model, name: str, option: str):
    """Return the model with an adapter merged into its weights; raise UserError if PEFT is not installed."""
    if from_hub(_File, name, f"{option}={name}", file="adapter_model.safetensors") is None:
        raise UserError(
            option=option,
            got=name,
            why="is an adapter without its weights",
            need="the file adapter_model.safetensors beside its config",
            hint="save the adapter anew with save_pretrained of PEFT, or choose another one",
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(
            option=option,
            got=name,
            why="is an adapter, and PEFT is not installed",
            need="the package PEFT to merge the adapter into its model",
            hint="type pip install 'kd[peft]', or give a folder where the adapter is merged",
        ) from error

    class Merged:
        @staticmethod
        def from_pretrained(name: str, trust_remote_code: bool):
            adapted = PeftModel.from_pretrained(model, name)
            if not hasattr(adapted.base_model, "merge_and_unload"):
                raise ValueError(
                    f"{adapted.active_peft_config.peft_type.value} changes no weights, so it cannot be merged"
                )
            return adapted.merge_and_unload(safe_merge=True)

    return from_hub(Merged, name, f"{option}={name}").requires_grad_(True)


class _FromConfig:
    @staticmethod
    def from_pretrained(name: str, config, **settings):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, **settings)


class _File:
    @staticmethod
    def from_pretrained(name: str, file: str, **settings) -> str | None:
        """Return the local path of a file of a folder or of the Hub; None if there is no such file."""
        from transformers.utils import cached_file

        no_raise = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        return cached_file(name, file, **no_raise)


class _Harmless:
    """Reader of a model's config.json that refuses kernels of the Hub, since they are code."""

    @staticmethod
    def from_pretrained(name: str, **settings) -> None:
        from transformers import PretrainedConfig

        def check(node) -> None:
            for key, value in node.items() if isinstance(node, dict) else ():
                if "implementation" in key and "/" in str(value):
                    raise ValueError(f"its {CONFIG} asks for code of the Hub, {key}={value}, which kd runs none of.")
                check(value)

        check(PretrainedConfig.get_config_dict(name)[0])


def from_hub(auto, name: str, subject: str, **settings):
    """Return auto.from_pretrained(name); raise UserError with a hint if it cannot be loaded.

    subject: of the error, such as student.name=gpt2, or "The tokenizer of gpt2".
    """
    check_name(name, subject)
    folder = Path(name).is_dir()
    if not folder:
        offline_unless_reachable()
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **settings)
    except UserError:
        raise
    except Exception as error:  # of several libraries, and of packages that they lack
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines[:1] and lines[0].endswith(":") else 1]) or type(error).__name__
        if not isinstance(error, OSError | ValueError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        location = "in that folder"
        hint = "check the files of that folder, or give another model"
        if not folder:
            location = f"no folder {Path(name).absolute()}, and the Hub did not give it"
            network = "check the name and the network, or give the folder of a downloaded model"
            hint = "; else ".join(filter(None, (meant(name), network)))
        raise UserError(option=subject, why=f"could not be loaded ({location}): {reason}", hint=hint) from error


def revision(name: str) -> str | None:
    """Return the commit of a Hub model's last download on this machine; None if there is none."""
    cached = try_to_load_from_cache(name, CONFIG)
    return Path(cached).parent.name if isinstance(cached, str) else None
