"""Pure maths of what posteriors are made of: diagonal and matrix-variate Gaussians, and standard normal noise."""
