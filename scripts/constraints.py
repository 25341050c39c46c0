"""Print pip constraints that keep the NumPy of a sourced ROS 2, for its compiled packages need just that one.

Run by the Makefile with the interpreter that ROS uses. Needs nothing but NumPy.
"""

import numpy

print(f'numpy=={numpy.__version__}')
if int(numpy.__version__.partition('.')[0]) < 2:
    # Later wheels refuse NumPy 1 when they are imported, without saying so in their metadata.
    print('pyarrow<22')
