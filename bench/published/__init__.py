"""I-JEPA as published, by itself: the opponent of benchmarks and the oracle of tests.

Written from docs/method.md with torch alone. Nothing here uses njepa or njepa_kernels, so that an
agreement with them says something. Parameter names are the published ones, which are also those of
njepa: weights copy over.

- ``networks``: I-JEPA's encoder, predictor and loss, composed as the published code does it
- ``masks``: the multi-block sampler, image by image
- ``step``: the whole step, with optimizer and average
- ``shared_context``: one predictor pass over all blocks, by dense masked attention
- ``script``: a training script in the published style, for ``njepa_kernels.integrations``
"""
