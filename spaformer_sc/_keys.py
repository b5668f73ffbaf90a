"""Every slot of an AnnData that is written: the one place that knows their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """Slot names for one ``key_added``.

    Attributes
    ----------
    key_added
        The name that all slots derive from.
    """

    key_added: str = "spaformer"

    @property
    def layer(self) -> str:
        """Imputed expression, ``adata.layers``."""
        return self.key_added

    @property
    def sd(self) -> str:
        """Standard deviation of imputed expression, ``adata.layers``."""
        return f"{self.key_added}_sd"

    @property
    def embedding(self) -> str:
        """Latent, ``adata.obsm``."""
        return f"X_{self.key_added}"

    @property
    def uns(self) -> str:
        """Parameters, history and scores, ``adata.uns``."""
        return self.key_added

    def var(self, score: str) -> str:
        """Score per gene, ``adata.var``."""
        return f"{self.key_added}_{score}"

    @property
    def evaluated(self) -> str:
        """Name of the scores that ``tl.evaluate`` gives this result, unless another is asked for."""
        return f"{self.key_added}_evaluated"

    def obs(self, score: str) -> str:
        """Score per cell, ``adata.obs``."""
        return f"{self.key_added}_{score}"


def encoding_key(name: str) -> str:
    """Positional encoding ``name``, ``adata.obsm`` and ``adata.uns``, unless another key is given."""
    return f"X_pe_{name}"
