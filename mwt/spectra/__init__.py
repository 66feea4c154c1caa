"""A study of tangent kernels (`mwt.ntk`): models on one small signal, fits that exist, and the page of both."""
