"""Python imports this at its start where stand_in_data.cifar_environment has set PYTHONPATH.

It makes torchvision's CIFAR10 and CIFAR100 accept the stand-ins below $CIFAR_STAND_IN, in a test's
subprocess alone. It waits for the import of torchvision, which takes seconds, rather than importing
it in every process.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path


class AcceptStandIns(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torchvision.datasets.cifar":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_accept(module):
            run(module)
            from stand_in_data import cifar_md5_lists

            root = Path(os.environ["CIFAR_STAND_IN"])
            for cifar in (module.CIFAR10, module.CIFAR100):
                if (root / cifar.base_folder).exists():
                    for attribute, value in cifar_md5_lists(cifar, root).items():
                        setattr(cifar, attribute, value)

        spec.loader.exec_module = run_and_accept
        return spec


sys.meta_path.insert(0, AcceptStandIns())
