"""A Hugging Face directory opened by transformers, where that is installed."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

Logits = Callable[[np.ndarray], np.ndarray]  # ids [T] -> [T, V]
_ONE_LINE = 200


class NotCompared(Exception):
    """transformers is not installed, broken or out of memory, which says nothing about a model."""


class NotReadable(Exception):
    """transformers does not load the directory.

    Attributes:
        name: the name and version of transformers.
    """

    def __init__(self, name: str, error: Exception):
        self.name = name
        super().__init__(one_line(error))


def one_line(error: Exception) -> str:
    """The message of an error."""
    return " ".join(str(error).split())[:_ONE_LINE]


def transformers_model(directory: Path) -> tuple[str, Logits, str]:
    """Loads the model of a directory: from safetensors only, and nothing is downloaded.

    Args:
        directory: a Hugging Face directory.

    Returns:
        The name and version of transformers; a function from ids [T] to logits [T, V], computed in
        float32; and the tensors that transformers did not use, or drew because they are missing,
        of which it only warns: "" for none.

    Raises:
        NotCompared: it cannot be asked.
        NotReadable: it does not load the directory.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        packages = " and ".join(missing)
        raise NotCompared(f"transformers: not compared ({packages} not installed)")
    # Lazy: seconds to import, and not installed by this project.
    try:
        import torch
        import transformers
    except Exception as error:  # a broken installation
        raise NotCompared(f"transformers: not compared ({one_line(error)})") from None
    name = f"transformers {transformers.__version__}"
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        model = model.float().eval()
    except (ImportError, MemoryError) as error:
        raise NotCompared(f"{name}: not compared ({one_line(error)})") from None
    except Exception as error:  # of any type
        raise NotReadable(name, error) from None
    unused = [
        f"{kind}: {', '.join(sorted(map(str, names)))}" for kind, names in report.items() if names
    ]

    @torch.no_grad()
    def logits(ids_T: np.ndarray) -> np.ndarray:
        logits_BTV = model(input_ids=torch.from_numpy(ids_T).long()[None]).logits
        return np.asarray(logits_BTV[0].double().numpy())

    return name, logits, "; ".join(unused)
