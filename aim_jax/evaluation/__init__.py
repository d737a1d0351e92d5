"""Metrics for generated and reconstructed images."""

from aim_jax.evaluation.distribution import (
    Gaussian,
    InceptionScore,
    Moments,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from aim_jax.evaluation.reconstruction import codebook_use, psnr, ssim

__all__ = [
    "Gaussian",
    "InceptionScore",
    "Moments",
    "codebook_use",
    "density_coverage",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "psnr",
    "ssim",
]
