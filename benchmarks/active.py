"""Active choice: how many chosen labels are worth ten random ones, on sinusoids of unknown amplitude, phase, frequency.

Setting: the challenging sinusoid (Yoon et al. 2018), y = A sin(f x + b) + noise, A ~ U(0.1, 5), f ~ U(0.5, 2),
b ~ U(0, 2π), noise of standard deviation 0.01 A. Of each fresh task one random point is labelled; the others are chosen
one by one from a pool of 60 points x ~ U(−5, 5), by :func:`bayesmeta.learning_curve`, the method adapting anew after
each. Scored is the squared error of the predictive mean on 50 other points with noisy targets, mean over tasks. Beside
it stand random labels from the same pool, the mean over three orders. Each run says in :data:`RUNS` what it trains. All
counts of labels include the first.

Rows: ``METHOD_random_10_mse``, the goal; ``METHOD_CRITERION_6_mse``, with the goal as reference, the difference between
the two, and its standard error, paired over tasks; ``METHOD_CRITERION_points_to_reach_random_10_mse``, the fewest
labels with which the mean is no more than the goal. CRITERION is ``information``, ``variance``, ``random`` (the control: it
should take ten), or ``batch`` (information, three labels at a time: 1, 4, 7, 10 labels, and 7 instead of 6 in the row's
name). ``METHOD_seconds``: CPU time of the training.

``active_points_to_reach_random_10_mse`` has the bar: the information row of the method with the least random error on
validation tasks. ``--plots FOLDER`` draws the first tasks with the points in the order in which they were chosen.
Settings were chosen on tasks of other seeds.
"""
