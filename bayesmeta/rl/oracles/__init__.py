"""What the best policies reach where it can be computed: the bars that learners are held against."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
