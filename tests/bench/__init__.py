"What a search costs, measured: ours, the published one, and the training both are compared with."
