"""What the server asks of this node besides jobs."""

from fleet_agent.commands.call import CallOverError, CommandCall, CommandRoad
from fleet_agent.commands.channel import CommandChannel
from fleet_agent.commands.desk import CommandDesk, Handler
from fleet_agent.commands.faults import CommandFault
from fleet_agent.commands.journal import CommandJournal

__all__ = [
    "CallOverError",
    "CommandCall",
    "CommandChannel",
    "CommandDesk",
    "CommandFault",
    "CommandJournal",
    "CommandRoad",
    "Handler",
]
