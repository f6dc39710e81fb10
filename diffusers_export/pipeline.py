"""The pipeline of this folder: class labels and a seed in, images out."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class LatentFlowPipeline(DiffusionPipeline):
    """Samples a latent flow matching model.

        pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
        images = pipe(labels=[0, 1, 2], seed=42).images

    Args:
        network: the velocity network.
        vae: diffusers' autoencoder; None for a network of pixels.
        code: None; it makes diffusers download the folder `code`.
        defaults: settings of `__call__` by name, which its keyword arguments replace.
    """

    _optional_components: ClassVar = ["vae", "code"]

    def __init__(
        self,
        network: torch.nn.Module,
        vae: torch.nn.Module | None = None,
        code: None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, vae=vae, code=None)
        self.register_to_config(defaults=defaults or {})

    def __call__(
        self,
        labels: Sequence[int | str] | torch.Tensor | None = None,
        num_images: int | None = None,
        *,
        seed: int = 42,
        first_index: int = 0,
        batch_size: int = 64,
        precision: str = "fp32",
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        """Draw samples. Sample i depends only on `seed`, i, its label and the settings, whatever the batch size.

        Args:
            labels: ids or names of classes, one per image, where id K (the number of classes) is the null class; None: the
                classes in turn.
            num_images: number of images; None: the number of labels, or 1.
            seed: seed of the noise.
            first_index: index i of the first sample.
            batch_size: images at a time, which bounds the memory.
            precision: "fp32", "bf16" or "fp16", for the network's matrix products.
            output_type: "pil" (a list), "np" (float32 [N, H, W, C] in [0, 1]), "pt" (float32 [N, C, H, W] in [0, 1]), or
                "latent" (float32 [N, c, h, w]).
            return_dict: return an ImagePipelineOutput, and not a tuple.
            settings: of the solver and the guidance: method, num_steps, time_shift, time_grid, atol, rtol, cfg_scale,
                cfg_interval, ...; model_index.json lists all of them, with their defaults in this folder.
        """
        network: Any = self.network
        request = importlib.import_module(type(network).__module__).SampleRequest(
            labels,
            num_images,
            seed,
            first_index,
            batch_size,
            precision,
            output_type,
            {**self.config.defaults, **settings},
        )
        images = network.sample(self.vae, request, self.progress_bar)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """Refuse: copy the folder instead, because diffusers would leave out the code."""
        raise RuntimeError(
            f"{type(self).__name__} does not write folders: copy the folder {self.config._name_or_path}, or export the "
            "checkpoint again"
        )
