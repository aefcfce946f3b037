import sys

sys.path.append("/usr/lib/caisson")
from agent.__main__ import main

main()
