"""Which planner a database's WAL asks for."""

from app.core.base.errors import InvariantViolation
from app.core.engines.append_only import planner as append_only
from app.core.engines.base import CheckpointPlan, Planner, PlannerContext
from app.core.engines.libsql import planner as libsql
from app.core.stores.manifest.records import Engine

PLANNERS: dict[Engine, Planner] = {
    "append_only": append_only.plan_checkpoint,
    "libsql": libsql.plan_checkpoint,
}


def plan_checkpoint(context: PlannerContext) -> CheckpointPlan | None:
    """Plans by the engine that the WAL segments name in their headers; all must agree with the
    database. Raises InvariantViolation otherwise.
    """
    if not context.segments:
        return None
    engine = context.database.engine
    if any(segment.engine != engine for segment in context.segments):
        raise InvariantViolation(
            "WAL segments of another engine", db_id=context.database.db_id, engine=engine
        )
    return PLANNERS[engine](context)
