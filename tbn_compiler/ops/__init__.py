"""Operators of the ``tbn`` namespace of ``torch.library``.

========================  ==========================================================================
``tbn::tile``             weight -> replicated tile ``B`` (Eq. 2-5), straight-through gradient (Eq. 6)
``tbn::scale``            ``B`` and the alpha source -> the weight that the layer uses (Eq. 7, 9)
``tbn::train_linear``     linear layer on a latent weight or tile, with gradients, on the rows that differ
``tbn::train_conv*``      convolutions likewise, ``train_conv1d`` to ``train_conv_transpose3d``
``tbn::quantize_input``   an input in int8 or binary, as inference takes it, straight-through gradient
``tbn::unpack``           stored tile and alphas -> the weight ``alpha * B``
``tbn::unpack_bits``      packed bits -> +1 / -1
``tbn::linear``           inference: linear layer on a stored tile
``tbn::conv1d/2d/3d``     inference: convolution on a stored tile
``tbn::conv_transpose*``  inference: transpose convolution on a stored tile, ``1d``, ``2d`` or ``3d``
========================  ==========================================================================

:mod:`schemas` holds names and types; :mod:`calls` what a call of an inference operator is: arguments by name, layout,
checks, fakes; :mod:`reference` the kernels that run on any device; :mod:`formats` the number formats of activations and
the functions behind a layer; :mod:`autograd` the gradients; :mod:`latents` what is trained, and :mod:`training` the
layers that train it, on the rows that differ or on the :mod:`whole_weight`; :mod:`autocast` the dtype under autocast. A
backend registers a faster kernel for its device with :func:`calls.register_kernel`.
"""

from __future__ import annotations

from tbn_compiler.ops import activations, autocast, autograd, calls, latents, reference, training
from tbn_compiler.ops.schemas import LIBRARY

calls.register_fakes()
autograd.register()
reference.register()
autocast.register()
latents.register()
training.register()
activations.register()

__all__ = ["LIBRARY"]
