"""One file per way of running a model, all behind `base.Backend`."""
