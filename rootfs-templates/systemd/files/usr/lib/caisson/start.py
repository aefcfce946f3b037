import sys

sys.path.append("/usr/lib/caisson")
from caisson.agent.__main__ import main

main()
