"""Ministral: Mistral's layer, with a window in those layers that the config says.

Spec: the config and weights of Ministral-8B.
"""

from __future__ import annotations

from torchtune.models import mistral

COVERS = "Ministral 8B"
DEFAULTS = mistral.DEFAULTS
build = mistral.build
