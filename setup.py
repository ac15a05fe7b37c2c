"Reads settings.ini; the wheel has templates, studies, tutorials and tables as folders of the package."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=[word.strip() for word in settings["keywords"].split(",")],
    author=settings["author"],
    license=settings["license"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={key.removeprefix("extra_"): settings[key].split() for key in settings
                    if key.startswith("extra_")},
    entry_points={"console_scripts": settings["console_scripts"].split(),
                  "nbdev": ["s3pet_nb=s3pet_nb._modidx:d"]},
    packages=[*find_packages(include=["s3pet_nb*"]), "s3pet_nb.templates", "s3pet_nb.studies",
              "s3pet_nb.tutorials", "s3pet_nb.tables"],
    package_dir={"s3pet_nb.templates": "nbs/experiments", "s3pet_nb.studies": "nbs/studies",
                 "s3pet_nb.tutorials": "nbs/tutorials", "s3pet_nb.tables": "reports"},
    package_data={"s3pet_nb.lab": ["assets/*"], "s3pet_nb.templates": ["*.ipynb"],
                  "s3pet_nb.studies": ["*.yml"], "s3pet_nb.tutorials": ["*.ipynb", "*.json"],
                  "s3pet_nb.tables": ["table-*/*"]},
)
