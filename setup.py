from setuptools import setup
from setuptools.command.install import install


class InstallBeside(install):
    """Install into a folder of our own at the end of Python's path.

    The public segment-anything has a package `segment_anything` too, and pip would overwrite one with the other.
    """

    def initialize_options(self) -> None:
        super().initialize_options()
        self.extra_path = "sam_bdd100k"  # the name of the folder and of the .pth file


setup(cmdclass={"install": InstallBeside})
