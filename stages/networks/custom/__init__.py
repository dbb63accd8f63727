"""Networks of your own: one Python file each, with a function `build(classes, channels, **arguments)`.

`library: custom` and `architecture: <file name>` in `params.yaml` name one. `build` returns a module that maps
`[N, channels, S, S]` to logits `[N, classes]`. The file holds all of the network's code, because `model.json` records
the file's hash alone. `MEAN` and `STD`, one value for each channel and for pixels in [0, 1], may say how the network's
weights expect their images to be normalized.
"""
