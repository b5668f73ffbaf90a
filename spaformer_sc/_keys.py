"""Every slot of an AnnData that is written: the one place that knows their names."""

from __future__ import annotations

from dataclasses import dataclass

SCORES = (
    "pearson",
    "pearson_se",
    "pearson_neighbours",
    "deviance_explained",
    "deviance_explained_se",
    "deviance_explained_neighbours",
    "gain",
    "gain_over_baseline",
    "gain_over_baseline_se",
    "true_correlation",
    "true_correlation_se",
    "held_out",
    "reliability",
)
"""Scores of genes."""

BACK = ("dispersion", "dispersion_missing")
"""What leads back from log-normalised values of genes to counts."""

OF_CELLS = ("depth", "gain", "gain_se", "reliability")
"""Depth and scores of cells."""

EVALUATED = tuple(score for score in SCORES if not score.endswith("_neighbours"))
"""Scores of genes that ``tl.evaluate`` gives."""

EVALUATED_OF_CELLS = OF_CELLS[1:]
"""Scores of cells that ``tl.evaluate`` gives."""


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

    @property
    def slots(self) -> list[tuple[str, str]]:
        """All that ``tl.impute`` writes but ``uns``, as pairs of attribute and key."""
        return [
            *(("layers", name) for name in (self.layer, self.sd)),
            ("obsm", self.embedding),
            *(("var", self.var(score)) for score in (*SCORES, *BACK)),
            *(("obs", self.obs(score)) for score in OF_CELLS),
        ]


def encoding_key(name: str) -> str:
    """Positional encoding ``name``, ``adata.obsm`` and ``adata.uns``, unless another key is given."""
    return f"X_pe_{name}"
