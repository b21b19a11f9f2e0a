"""What the best policies reach where it can be computed: the bars that learners are held against."""
