"""fewstep ships diffusion models to devices. See fewstep.runtime to run a bundle and fewstep.export to make one."""

__version__ = "0.1.0"
