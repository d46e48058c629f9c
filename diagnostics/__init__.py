"""Self-tests on the user's machine: `urform doctor`. Are the kernels right here, does this model keep texts apart?"""
