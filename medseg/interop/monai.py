"""The sliding window of medseg as an inferer of MONAI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer
from monai.utils import BlendMode, PytorchPadMode, ensure_tuple_rep, fall_back_tuple, look_up_option, optional_import
from torch import Tensor

from medseg.errors import InputError
from medseg.resample import Slab, largest
from medseg.sliding_window import Network, Tiling, as_slices, roll, rolling_axis, three_axes


class SlabInferer(Inferer):
    """MONAI's ``SlidingWindowInferer`` in less memory: sums of logits exist for one patch's depth at a time.

    Called in the same way, with the same tiles, padding and weights, it gives the same logits, to rounding in float32.
    With ``argmax`` it gives the mask, and the logits of the image exist at no time.

    >>> import torch
    >>> from monai.networks.nets import BasicUNet
    >>> from medseg.interop import SlabInferer
    >>> network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=3, features=(4, 4, 8, 8, 16, 4)).eval()
    >>> image = torch.rand(1, 1, 50, 40, 40)
    >>> inferer = SlabInferer(roi_size=(32, 32, 32), overlap=0.5, mode="gaussian")
    >>> inferer(image, network).shape
    torch.Size([1, 3, 50, 40, 40])
    >>> inferer = SlabInferer(roi_size=(32, 32, 32), overlap=0.5, mode="gaussian", argmax=True)
    >>> mask = inferer(image, network)
    >>> mask.shape, mask.dtype
    (torch.Size([1, 1, 50, 40, 40]), torch.uint8)

    No gradient flows through it, and a tile of a single value is computed once: so the network must always give the
    same for the same tile.

    Args:
        roi_size: of a tile, for all axes or each; where it is not above 0 or None, the image's size.
        sw_batch_size: tiles of an image that the network gets at once.
        overlap: fraction of a tile that neighbours share, for all axes or each; from 0 on and below 1.
        mode: ``constant`` or ``gaussian``, where weights below a thousandth count as a thousandth, as in MONAI.
        sigma_scale: deviation of the Gaussian as a fraction of the tile, for all axes or each.
        padding_mode, cval: of ``torch.nn.functional.pad``, for images smaller than a tile.
        sw_device: where the network is; that of the inputs where None.
        device: where sums and result are; that of the inputs where None.
        progress: show slabs by ``tqdm``, which must be installed.
        cpu_thresh: sums and result of images of more voxels are on the CPU, where ``device`` is None.
        cache_roi_weight_map, buffer_steps, buffer_dim: MONAI's ways to save time or memory; without effect here.
        with_coord: must be False.
        argmax: give the largest class, uint8 (N, 1, ...), in place of logits.

    Raises:
        InputError: a value that it does not take; where a call shows it, at the call.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.25,
        mode: BlendMode | str = BlendMode.CONSTANT,
        sigma_scale: Sequence[float] | float = 0.125,
        padding_mode: PytorchPadMode | str = PytorchPadMode.CONSTANT,
        cval: float = 0.0,
        sw_device: torch.device | str | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        cache_roi_weight_map: bool = False,
        cpu_thresh: int | None = None,
        buffer_steps: int | None = None,
        buffer_dim: int = -1,
        with_coord: bool = False,
        argmax: bool = False,
    ) -> None:
        if with_coord:
            raise InputError("with_coord", "True", "False", "use MONAI's SlidingWindowInferer for such a network")
        if sw_batch_size < 1:
            raise InputError("sw_batch_size", f"{sw_batch_size}", "1 or more")
        self.roi_size, self.overlap, self.sw_batch_size = roi_size, overlap, sw_batch_size
        self.mode, self.sigma_scale = BlendMode(mode), sigma_scale
        self.padding = (look_up_option(padding_mode, PytorchPadMode).value, cval)
        self.sw_device, self.device, self.cpu_thresh = sw_device, device, cpu_thresh
        self.argmax, self._shown = argmax, _bar() if progress else iter

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a network over images.

        Args:
            inputs: (N, C, H, W) or (N, C, D, H, W); of a MetaTensor the result has the metadata.
            network: (n, C, *roi) -> logits (n, classes, *roi), one tensor. It gets plain tensors.
            *args: handed to the network.
            **kwargs: likewise; but ``device``, which stands for that of the constructor.

        Returns:
            Logits (N, classes, ...), of the inputs' type where that is a floating one, else float32; or the mask.

        Raises:
            InputError: inputs of other axes than the tile; a network that gives something else; more than 256 classes
                for ``argmax``; logits that are not finite.
        """
        store = torch.device(kwargs.pop("device", self.device) or self._store(inputs))
        for name in ("buffer_steps", "buffer_dim"):
            kwargs.pop(name, None)
        if kwargs.get("condition") is not None:
            raise InputError("condition", "is given", "None", "use MONAI's SlidingWindowInferer for such a network")
        if inputs.ndim not in (4, 5) or not len(inputs):
            raise InputError(
                "inputs", f"have shape {tuple(inputs.shape)}", "(N, C, H, W) or (N, C, D, H, W), N above 0"
            )
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        result = self._run(plain, _checked(lambda batch: network(batch, *args, **kwargs)), store)
        if not isinstance(inputs, MetaTensor):
            return result
        whole = MetaTensor(result)
        whole.copy_meta_from(inputs)  # type: ignore[no-untyped-call]
        return whole

    def _run(self, images: Tensor, network: Network, store: torch.device) -> Tensor:
        flat, tiling = images.ndim == 4, self._tiling(images.shape[2:])
        if flat:
            images, network = images.unsqueeze(2), as_slices(network)
        result = torch.empty(0)
        for index, slab in self._slabs(images, network, tiling, store):
            values = self._decided(slab.logits)
            if not result.numel():
                kind = values.dtype if self.argmax or not images.is_floating_point() else images.dtype
                result = torch.empty(len(images), values.shape[-1], *tiling.shape, dtype=kind, device=store)
            planes = result[index].movedim((1 + slab.axis, 0), (0, -1))
            planes[slab.start : slab.stop, slab.rows[0] : slab.rows[1]] = values
        return result.squeeze(2) if flat else result

    def _store(self, inputs: Tensor) -> torch.device:
        large = self.cpu_thresh is not None and inputs.shape[2:].numel() > self.cpu_thresh
        return torch.device("cpu") if large else inputs.device

    def _slabs(self, images: Tensor, run: Network, tiling: Tiling, store: torch.device) -> Iterator[tuple[int, Slab]]:
        pairs = (
            (index, slab)
            for index, image in enumerate(images)
            for slab in roll(
                [run],
                image,
                tiling,
                axis=rolling_axis(tiling.shape, tiling.patch),
                device=self.sw_device or images.device,
                store=store,
                batch_size=self.sw_batch_size,
            )
        )
        yield from self._shown(pairs)

    def _tiling(self, shape: Sequence[int]) -> Tiling:
        """Tiles as MONAI lays them: in equal steps from 0 on, the last one moved back to the end."""
        try:
            patch = tuple(int(n) for n in fall_back_tuple(self.roi_size, shape))
            overlaps = ensure_tuple_rep(self.overlap, len(shape))
        except ValueError as failure:
            raise InputError("roi_size or overlap", str(failure), f"one value, or {len(shape)}") from None
        if not all(0 <= overlap < 1 for overlap in overlaps):
            raise InputError("overlap", f"{self.overlap}", "0 or more, below 1")
        starts = []
        for size, roi, overlap in zip(shape, patch, overlaps, strict=True):
            step = roi if roi >= size else max(int(roi * (1 - overlap)), 1)
            before = max(0, roi - size) // 2
            starts.append([s.start - before for (s,) in dense_patch_slices((max(size, roi),), (roi,), (step,))])
        weight = compute_importance_map(patch, mode=self.mode, sigma_scale=self.sigma_scale)
        flat = [[0]] if len(shape) == 2 else []
        whole = three_axes(patch)
        return Tiling(three_axes(shape), whole, flat + starts, weight.view(whole), self.padding)

    def _decided(self, logits: Tensor) -> Tensor:
        if not self.argmax:
            return logits
        if logits.shape[-1] > 256:
            raise InputError("network", f"gives {logits.shape[-1]} classes", "at most 256 for argmax")
        return largest(logits).unsqueeze(-1)


def _bar() -> Callable[[Iterator[Any]], Iterator[Any]]:
    bar, found = optional_import("tqdm", name="tqdm")
    if not found:
        raise InputError("progress", "True, but tqdm is not installed", "tqdm", "install it: pip install tqdm")
    return cast("Callable[[Iterator[Any]], Iterator[Any]]", bar)


def _checked(network: Callable[[Tensor], Any]) -> Network:
    """The network, refused where it gives anything but one tensor of the tile's size."""

    def run(batch: Tensor) -> Tensor:
        logits = network(batch)
        if isinstance(logits, list | tuple) and len(logits) == 1:  # as MONAI's BasicUNetPlusPlus
            logits = logits[0]
        if not isinstance(logits, Tensor):
            raise InputError("network", f"gives a {type(logits).__name__}", "one tensor", "hand over a function of it")
        if logits.ndim != batch.ndim or logits.shape[2:] != batch.shape[2:]:
            raise InputError("network", f"gives {tuple(logits.shape)} for {tuple(batch.shape)}", "a tile's own size")
        return logits

    return run
