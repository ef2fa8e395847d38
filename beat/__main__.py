"""`python -m beat`: Celery's beat. It keeps no file and no pid file: any number of restarts is harmless."""

from app.celery_app import celery_app
from app.settings import get_settings


def main() -> None:
    celery_app.start(
        [
            "--quiet",
            "beat",
            "--scheduler=beat.scheduler:JobstackScheduler",
            "--pidfile=",
            f"--loglevel={get_settings().log_level}",
        ]
    )


if __name__ == "__main__":
    main()
