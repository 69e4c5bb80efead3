"""Packages for setup.cfg: memcache_jax/kernels is a link to kernels/.

A zip file of the repository, or a checkout on Windows, may have a text file in the link's place. So
the packages of kernels/ are named by where they are.
"""

from setuptools import find_namespace_packages, setup

OWN, KERNELS = "memcache_jax", "memcache_jax.kernels"

setup(
    packages=[
        *find_namespace_packages(include=[f"{OWN}*"], exclude=[f"{KERNELS}*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_namespace_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
)
