"""Pure maths of posteriors: diagonal and matrix-variate Gaussians, and standard normal noise."""
