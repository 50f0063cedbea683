"""`python -m fleet_client` is the command `fleet`."""

from fleet_client.cli import main

main()
