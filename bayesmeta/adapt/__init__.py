"""The methods: one file each, always in the same order: config, state, adapt, loss, guide."""
