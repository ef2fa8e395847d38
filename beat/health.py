"""`python -m beat.health`: exit code 0 while beat ticks."""

from app import alive

LIMIT_SECONDS = 30

if __name__ == "__main__":
    alive.check("beat", LIMIT_SECONDS)
